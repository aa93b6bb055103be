"""From a folder in NVIDIA's layout to a model that is ready to train: `build` on meta, then `fill`.

Between the two, the caller may shard the parameters: `fill` then reads only this rank's rows of each tensor,
so that a rank's memory holds its own part and one tensor's rows, never the whole model.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.model import keys
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.init import initial_values, row_generator
from nemo_ray.model.lora import LoraTargets, apply_lora
from nemo_ray.model.patches import patch_model


def read_model_config(base_model: str) -> NemotronHConfig:
    """Read config.json of a Nemotron-H folder.

    Raises: ConfigError where there is none, or it is of another architecture.
    """
    path = Path(base_model) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"base_model: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"base_model: {path} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "nemotron_h":
        found = raw.get("model_type") if isinstance(raw, dict) else None
        raise ConfigError(f"base_model: {path} has model_type {found!r}, and nemo_ray trains nemotron_h only")
    try:
        config = NemotronHConfig.from_pretrained(base_model, local_files_only=True)
    except Exception as error:  # transformers raises several kinds, some of them its own
        raise ConfigError(f"base_model: {path} is no usable nemotron_h config: {error}") from None
    if config.tie_word_embeddings:
        raise ConfigError(f"base_model: {path} ties lm_head to the embeddings, which Nemotron-H never does")
    return config


def build(
    config: NemotronHConfig, adapter: AdapterSection, dtype: torch.dtype, device: torch.device
) -> tuple[NemotronHForCausalLM, LoraTargets | None]:
    """Make the patched model on meta, with LoRA in place where `adapter` asks for it.

    Args:
        dtype: of the base's parameters; the router's bias buffer stays float32, as do LoRA factors.
        device: where it will run (decides about kernels); the parameters are on meta until `fill`.

    Returns: the model, and what LoRA was put on (None: all parameters train).
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    # Parameters only: `.to(dtype)` would round the router's float32 bias buffer.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    patch_model(model, device)
    targets = apply_lora(model, adapter) if adapter.adapter else None
    return model, targets


class Checkpoint:
    """The tensors of a model folder, by NVIDIA's keys; safetensors only, read by slices."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, safe_open] = {}
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {key: self.folder / name for key, name in weight_map.items()}
        elif single.exists():
            self.files = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise CheckpointError(
                f"base_model: {self.folder} has neither model.safetensors nor model.safetensors.index.json "
                "(other formats are not read); for random weights set reinit_weights: true"
            )
        self._rename_old_spellings()

    def _rename_old_spellings(self) -> None:
        self._name_on_disk = {key: key for key in self.files}
        for right, old_names in keys.OLD_SPELLINGS.items():
            for old in old_names:
                if right not in self.files and old in self.files:
                    self.files[right] = self.files.pop(old)
                    self._name_on_disk[right] = old

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"base_model: {path} cannot be read: {error}") from None
        return self._open[path]

    def rows(self, key: str, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Rows [start, stop) of the tensor `key`, which must be of `shape`."""
        path = self.files[key]
        view = self._file(path).get_slice(self._name_on_disk[key])
        if tuple(view.get_shape()) != shape:
            raise CheckpointError(
                f"base_model: {key} in {path} is {tuple(view.get_shape())}, and config.json makes it {shape}"
            )
        return view[start:stop]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Base parameters and buffers, without LoRA factors."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name.rpartition(".")[2]:
            yield name, parameter
    yield from model.named_buffers()


def _local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of a tensor that is whole or sharded by rows, and its first row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offset[1:]), "only dim 0 is ever sharded"
    return tensor.to_local(), offset[0]


@torch.no_grad()
def fill(
    model: NemotronHForCausalLM, base_model: str | None, seed: int, device: torch.device, adapter_seed: int
) -> None:
    """Give every parameter and buffer its values, on `device`.

    Args:
        base_model: folder to read; None draws random weights from `seed`, the same for any sharding.
        adapter_seed: LoRA factors A are drawn from it, whatever the sharding; B starts at zero.

    Raises: CheckpointError for a missing, left-over or misshapen tensor.
    """
    num_experts = model.config.n_routed_experts
    checkpoint = Checkpoint(base_model) if base_model is not None else None
    if checkpoint:
        _check_keys(model, checkpoint, num_experts)
    model.to_empty(device=device)
    for name, tensor in _named_tensors(model):
        local, first = _local_rows(tensor)
        if checkpoint is None:
            initial_values(local, name, first, tuple(tensor.shape), model.config, seed)
            continue
        place = keys.stored(name, num_experts)
        if place.stacked:
            for row in range(local.shape[0]):
                shape = tuple(tensor.shape[1:])
                local[row].copy_(checkpoint.rows(place.keys[first + row], 0, shape[0], shape))
        elif local.numel():
            local.copy_(checkpoint.rows(place.keys[0], first, first + local.shape[0], tuple(tensor.shape)))
    _fill_adapter(model, adapter_seed)


def _check_keys(model: nn.Module, checkpoint: Checkpoint, num_experts: int) -> None:
    wanted = {key for name, _ in _named_tensors(model) for key in keys.stored(name, num_experts).keys}
    found = {key for key in checkpoint.files if not keys.is_unused(key)}
    for problem, names in (("lacks", wanted - found), ("has, and the model does not,", found - wanted)):
        if names:
            raise CheckpointError(
                f"base_model: {checkpoint.folder} {problem} {len(names)} tensors, first {sorted(names)[0]}"
            )


def _fill_adapter(model: nn.Module, seed: int) -> None:
    """A uniform in +-sqrt(3 / inputs) / sqrt(3), as PEFT draws it (kaiming, a = sqrt 5); B zero."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        local, first = _local_rows(parameter)
        if leaf.endswith("lora_B"):
            local.zero_()
        elif leaf.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            for row in range(local.shape[0]):
                generator = row_generator(seed, name, first + row, local.device)
                local[row].uniform_(-bound, bound, generator=generator)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, whole model whatever the sharding: {"total", "trainable", "routed_experts"}."""
    banks = tuple(name for name, module in model.named_modules() if isinstance(module, RoutedExperts))
    sizes = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]
    return {
        "total": sum(size for _, size, _ in sizes),
        "trainable": sum(size for _, size, trains in sizes if trains),
        "routed_experts": sum(size for name, size, _ in sizes if name.startswith(banks) and banks),
    }
