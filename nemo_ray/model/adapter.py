"""Writing what was trained: LoRA as PEFT's files, a full model in NVIDIA's layout.

Every rank calls these together, since sharded tensors are gathered one by one; rank 0 writes.

Shapes: E experts, R rank, I inputs, O outputs.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import NemotronHConfig

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model import keys
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.lora import LoraTargets, lora_parameters

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; gathers it where it is sharded (every rank must call)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """LoRA factors under PEFT's keys and in PEFT's shapes, gathered from all ranks.

    PEFT keeps an expert bank's factors as 2-D matrices: A (E*R, I) with the experts one after another, and
    B (O, R*E) with the expert index running fastest.
    """
    both = {
        name: module.up_lora_A is not None and module.down_lora_A is not None
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
    }
    state = {}
    for name, parameter in lora_parameters(model).items():
        owner = name.rpartition(".")[0]
        value = _whole(parameter)
        if owner not in both:
            state[keys.peft_linear(name)] = value.contiguous()
        elif name.endswith("lora_A"):
            state[keys.peft_expert(name, both[owner])] = value.flatten(0, 1).contiguous()
        else:
            state[keys.peft_expert(name, both[owner])] = value.permute(1, 2, 0).flatten(1).contiguous()
    return state


def _suffixes(paths: Iterable[str], rest: Iterable[str], depth: int) -> list[str]:
    """The shortest endings, of at most `depth` parts, that match `paths` and nothing of `rest`."""
    paths, rest = set(paths), set(rest)
    for parts in range(1, depth + 1):
        endings = {".".join(path.split(".")[-parts:]) for path in paths}
        if not any(other.endswith(tuple("." + e for e in endings)) for other in rest - paths):
            return sorted(endings)
    return sorted(paths)


def save_adapter(
    model: nn.Module,
    adapter: AdapterSection,
    targets: LoraTargets,
    base_model: str,
    folder: Path,
    write: bool,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which plain PEFT loads."""
    state = adapter_state(model)
    if not write:
        return
    from peft import LoraConfig  # slow to import, and only rank 0 needs it

    every_leaf = [name for name, module in model.named_modules() if not list(module.children())]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=0.0 if targets.parameters else adapter.lora_dropout,
        use_rslora=adapter.peft_use_rslora,
        target_modules=_suffixes(targets.modules, every_leaf, depth=3),
        target_parameters=sorted({".".join(name.split(".")[-2:]) for name in targets.parameters}) or None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(state, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    _copy_tokenizer(base_model, folder)
    (folder / "README.md").write_text(_usage(base_model, targets), encoding="utf-8")


def _usage(base_model: str, targets: LoraTargets) -> str:
    lines = [
        f"# LoRA adapter for {base_model}",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f'base = AutoModelForCausalLM.from_pretrained("{base_model}")',
        "for block in base.model.layers:",
        '    if block.block_type == "linear_attention":',
        "        block.mixer.time_step_limit = tuple(base.config.time_step_limit)",
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        "```",
        "",
        "The loop sets the limit of Mamba's step as config.json has it, and as it was in training.",
        "transformers up to 5.23 clamps it at `time_step_min` instead.",
    ]
    if any(name.endswith(".out_proj") for name in targets.modules):
        lines += [
            "",
            "This adapter targets Mamba's `out_proj`. PEFT 0.20 and newer refuse that on nemotron_h, because",
            "transformers' training kernel reads the weight past the adapter. Inference is right; lift the",
            "check before loading:",
            "",
            "```python",
            "from peft.tuners.lora import LoraModel",
            "LoraModel._check_target_module_compatiblity = lambda *args, **kwargs: None",
            "```",
        ]
    return "\n".join(lines) + "\n"


def save_model(
    model: nn.Module, config: NemotronHConfig, base_model: str, folder: Path, dtype: torch.dtype, write: bool
) -> None:
    """Write the whole model in NVIDIA's layout: model.safetensors, config.json, the tokenizer's files."""
    state: dict[str, torch.Tensor] = {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        place, value = keys.stored(name, config.n_routed_experts), _whole(tensor)
        if not name.endswith("e_score_correction_bias"):
            value = value.to(dtype)
        if not write:
            continue
        if place.stacked:
            state.update(zip(place.keys, (row.contiguous() for row in value), strict=True))
        else:
            state[place.keys[0]] = value.contiguous()
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(state, folder / "model.safetensors")
    raw = json.loads((Path(base_model) / "config.json").read_text(encoding="utf-8"))
    # vLLM reads the pattern, transformers the list: write both.
    raw["layers_block_type"] = list(config.layers_block_type)
    raw["hybrid_override_pattern"] = config.hybrid_override_pattern
    raw["num_nextn_predict_layers"] = 0  # the multi-token prediction head was not trained along
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer(base_model, folder)


def _save_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors 0.8 leaves it readable by its owner only


def _copy_tokenizer(base_model: str, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        source = Path(base_model) / name
        if source.exists():
            shutil.copyfile(source, folder / name)
