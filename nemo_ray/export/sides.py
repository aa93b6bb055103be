"""Logits of the two sides of a check: our patched model, and transformers' and PEFT's own.

What is set on the plain side, and said: `time_step_limit` as config.json has it, which transformers up to
5.23 clamps otherwise; and for an adapter on `out_proj` PEFT's refusal is lifted, for that one call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nemo_ray.errors import CheckpointError
from nemo_ray.export.shards import DTYPES, read_shard
from nemo_ray.model import keys
from nemo_ray.model.adapter_reader import AdapterFiles
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.inference import load_for_inference
from nemo_ray.model.load import Checkpoint, Precision
from nemo_ray.model.lora import LoraLinear

Say = Callable[[str], None]
Logits = list[torch.Tensor]
"""One float32 tensor (tokens, vocabulary) on the CPU for each prompt."""


@dataclass(frozen=True)
class Setting:
    """Where and in what the two models compute."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"


@torch.no_grad()
def _logits(
    forward: Callable[[torch.Tensor], torch.Tensor], prompts: list[torch.Tensor], setting: Setting
) -> Logits:
    return [forward(ids[None].to(setting.device))[0].float().cpu() for ids in prompts]


# -- our side -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OurLogits:
    """What our model gives.

    Attributes:
        apart: with the base's weights and the factors beside them.
        without: with the factors switched off.
        added: with the factors added to the weights, rounded as a merged checkpoint rounds them; empty where
            there is none.
    """

    apart: Logits
    without: Logits
    added: Logits


def our_logits(
    base: str,
    adapter: AdapterFiles | None,
    merged: Path | None,
    prompts: list[torch.Tensor],
    setting: Setting,
) -> OurLogits:
    """Logits of the base with the adapter on it, where there is one. The model is gone when this returns."""
    folder = None if adapter is None else adapter.folder
    model = load_for_inference(base, folder, Precision(setting.dtype, setting.dtype), setting.device)
    forward = partial(_our_forward, model)
    apart = _logits(forward, prompts, setting)
    with _without_factors(model):
        without = _logits(forward, prompts, setting)
    if adapter is None or merged is None:
        return OurLogits(apart, without, [])
    _add_factors(model, adapter, _dtypes_on_disk(merged))
    return OurLogits(apart, without, _logits(forward, prompts, setting))


def _our_forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.packed_logits(PackedBatch.from_lengths(ids, [[ids.shape[1]]]))


@contextmanager
def _without_factors(model: nn.Module) -> Iterator[None]:
    kept = [(m, m.scaling) for m in model.modules() if isinstance(m, LoraLinear)]
    banks = [(m, dict(m.scalings)) for m in model.modules() if isinstance(m, RoutedExperts)]
    for module, _ in kept:
        module.scaling = 0.0
    for bank, scalings in banks:
        bank.scalings = dict.fromkeys(scalings, 0.0)
    yield
    for module, scaling in kept:
        module.scaling = scaling
    for bank, scalings in banks:
        bank.scalings = scalings


def _dtypes_on_disk(folder: Path) -> dict[str, torch.dtype]:
    """Parameter's name in memory -> its type in the checkpoint."""
    files = set(Checkpoint(str(folder)).files.values())
    return {
        keys.in_memory(key)[0]: DTYPES[tensor.dtype]
        for path in files
        for key, tensor in read_shard(path, "--output").tensors.items()
        if not keys.is_unused(key)
    }


@torch.no_grad()
def _add_factors(model: nn.Module, adapter: AdapterFiles, dtypes: dict[str, torch.dtype]) -> None:
    """Add every factor to the weight beside it, rounded to the type on disk, and switch the factors off."""

    def add(weight: torch.Tensor, name: str, A: torch.Tensor, B: torch.Tensor, scaling: float) -> None:
        weight.copy_((weight.float() + scaling * (B @ A)).to(dtypes[name]))

    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            add(module.weight, f"{name}.weight", module.lora_A, module.lora_B, module.scaling)
            module.scaling = 0.0
        elif isinstance(module, RoutedExperts):
            for side, scaling in module.scalings.items():
                A, B = getattr(module, f"{side}_lora_A"), getattr(module, f"{side}_lora_B")
                if A is None:
                    continue
                for weight, a, b in zip(getattr(module, f"{side}_proj"), A, B, strict=True):
                    add(weight, f"{name}.{side}_proj", a, b, scaling)
                module.scalings[side] = 0.0
    for name in adapter.modules_to_save:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.to(dtypes[name]))


# -- the plain side -------------------------------------------------------------------------------


def plain_logits(
    folder: str, adapter: AdapterFiles | None, prompts: list[torch.Tensor], setting: Setting, say: Say
) -> Logits:
    """Logits of transformers' model of a folder, with the adapter put on by PEFT where there is one."""
    with _reported(f"transformers cannot load {folder}"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=setting.dtype, local_files_only=True, trust_remote_code=False
        )
    limit = tuple(model.config.time_step_limit)
    for block in model.model.layers:
        if block.block_type == "linear_attention":
            block.mixer.time_step_limit = limit
    say(f"transformers' own model: time_step_limit is set to {limit} of config.json, as in training and vLLM")
    if adapter is not None:
        from peft import PeftModel

        with _reported(f"PEFT cannot load {adapter.folder}"), _out_proj_allowed(adapter, say):
            model = PeftModel.from_pretrained(model, str(adapter.folder))
    model = model.to(setting.device).eval()
    return _logits(lambda ids: model(input_ids=ids, use_cache=False).logits, prompts, setting)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what a library raises into one line: that it cannot load the files is a result of the check."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"check: {what}: {type(error).__name__}: {reason}") from error


@contextmanager
def _out_proj_allowed(adapter: AdapterFiles, say: Say) -> Iterator[None]:
    """Lift PEFT's refusal of Mamba's out_proj (0.20 and newer) where the adapter has it; then put it back."""
    if not any(path.endswith(".out_proj") for path in adapter.linear):
        yield
        return
    from peft.tuners.lora import LoraModel

    name = "_check_target_module_compatiblity"  # PEFT's spelling
    kept = LoraModel.__dict__.get(name)
    setattr(LoraModel, name, lambda *args, **kwargs: None)
    say("PEFT's refusal of out_proj is lifted for this call, as README.md of the adapter does")
    try:
        yield
    finally:
        if kept is None:
            delattr(LoraModel, name)
        else:
            setattr(LoraModel, name, kept)
