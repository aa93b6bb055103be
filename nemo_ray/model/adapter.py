"""An adapter as PEFT's files, and back into a model.

Every rank calls these together: sharded tensors are gathered one by one for rank 0, which writes, and each
rank takes its own rows of an adapter that is loaded.

Shapes: E experts, R rank, I inputs, O outputs.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import ConfigError
from nemo_ray.model import keys
from nemo_ray.model.adapter_reader import AdapterFiles, LoraFactors, read_adapter
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.lora import LoraLinear, LoraTargets
from nemo_ray.model.saving import SavedBase, save_tensors
from nemo_ray.model.sharding import local_rows, whole
from nemo_ray.peft_config import require_strength
from nemo_ray.targets import Strength, alpha_of, saved_modules, strength_of


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that trains beside a frozen base, in PEFT's keys and shapes, gathered from all ranks."""
    return dict(_adapter_tensors(model))


def _adapter_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(PEFT's key, tensor) of LoRA factors and of the weights of modules that train whole, one by one.

    PEFT keeps an expert bank's factors as 2-D matrices: A (E*R, I) with the experts one after another, and
    B (O, R*E) with the expert index running fastest.
    """
    both = {
        name: bank.up_lora_A is not None and bank.down_lora_A is not None
        for name, bank in _banks(model).items()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        value = whole(parameter)
        if "lora_" not in leaf:
            yield keys.PEFT_PREFIX + name, value.contiguous()
        elif owner not in both:
            yield keys.peft_linear(name), value.contiguous()
        elif name.endswith("lora_A"):
            yield keys.peft_expert(name, both[owner]), value.flatten(0, 1).contiguous()
        else:
            yield keys.peft_expert(name, both[owner]), value.permute(1, 2, 0).flatten(1).contiguous()


def _banks(model: nn.Module) -> dict[str, RoutedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """PEFT's rank_pattern or alpha_pattern for the targets whose value is not `default`.

    No two of its patterns match one target: PEFT takes the first that does, and sorts them when it saves.
    """
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        paths = {path for path, its in values.items() if its == value}
        pattern |= dict.fromkeys(_suffixes(paths, values, depth=3), value)
    return pattern


def _suffixes(paths: Iterable[str], rest: Iterable[str], depth: int, least: int = 1) -> list[str]:
    """The shortest endings, of `least` to `depth` parts, that match `paths` and nothing else of `rest`; whole
    paths where there are none."""
    paths, rest = set(paths), set(rest)
    for parts in range(least, depth + 1):
        endings = {".".join(path.split(".")[-parts:]) for path in paths}
        if not any(other.endswith(tuple("." + e for e in endings)) for other in rest - paths):
            return sorted(endings)
    return sorted(paths)


def save_adapter(
    model: nn.Module,
    adapter: AdapterSection,
    targets: LoraTargets,
    base: SavedBase,
    folder: Path,
    write: bool,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which plain PEFT loads."""
    state = {}
    for key, tensor in _adapter_tensors(model):
        if write:
            state[key] = tensor
    if not write:
        return
    from peft import LoraConfig  # slow to import, and only rank 0 needs it

    every = (*targets.modules, *targets.parameters)
    ranks = {name: strength_of(adapter, name).rank for name in every}
    alphas = {name: alpha_of(adapter, name) for name in every}
    every_leaf = [name for name, module in model.named_modules() if not list(module.children())]
    every_bank = [f"{name}.{side}_proj" for name in _banks(model) for side in ("up", "down")]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name or base.folder,
        revision=base.revision,
        inference_mode=True,
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        rank_pattern=_pattern(ranks, adapter.lora_r),
        alpha_pattern=_pattern(alphas, adapter.lora_alpha),
        lora_dropout=0.0 if targets.parameters else adapter.lora_dropout,
        use_rslora=adapter.peft_use_rslora,
        target_modules=_suffixes(targets.modules, every_leaf, depth=3),
        target_parameters=_suffixes(targets.parameters, every_bank, depth=2, least=2) or None,
        modules_to_save=list(targets.saved) or None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(state, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    base.copy_tokenizer(folder)
    (folder / "README.md").write_text(_usage(base.name or base.folder, targets), encoding="utf-8")


@torch.no_grad()
def load_adapter(model: nn.Module, adapter: AdapterSection, folder: str | Path) -> None:
    """Copy the factors and whole modules of the PEFT adapter in `folder` into `model`, which was built for
    `adapter` and filled; each rank takes its own rows.

    Raises: ConfigError with the first difference, where targets, shapes, ranks or scalings are not the same;
        CheckpointError where the file is broken.
    """
    files = read_adapter(folder)
    pairs = _factor_pairs(model)
    saved = {f"{path}.weight" for path in saved_modules(adapter).values()}
    parameters = {name: p for name, p in model.named_parameters() if name in saved}
    _check_fits(f"adapter: {folder}", adapter, files, pairs, parameters)
    for name, (A, B) in pairs.items():
        stored = (files.experts if name in files.experts else files.linear)[name]
        _copy_rows(A, stored.A)
        _copy_rows(B, stored.B)
    for name, parameter in parameters.items():
        _copy_rows(parameter, files.modules_to_save[name])


Pair = tuple[nn.Parameter, nn.Parameter]


def _factor_pairs(model: nn.Module) -> dict[str, Pair]:
    """Target -> its factors A and B, in model order."""
    pairs: dict[str, Pair] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            pairs[name] = (module.lora_A, module.lora_B)
        elif isinstance(module, RoutedExperts):
            for side in ("up", "down"):
                pair = (getattr(module, f"{side}_lora_A"), getattr(module, f"{side}_lora_B"))
                if pair[0] is not None:
                    pairs[f"{name}.{side}_proj"] = pair
    return pairs


def _check_fits(
    where: str,
    adapter: AdapterSection,
    files: AdapterFiles,
    pairs: Mapping[str, Pair],
    saved: Mapping[str, nn.Parameter],
) -> None:
    stored: dict[str, LoraFactors] = {**files.linear, **files.experts}
    shapes = {name: (*B.shape[:-1], A.shape[-1]) for name, (A, B) in pairs.items()}
    shapes |= {name: tuple(parameter.shape) for name, parameter in saved.items()}
    theirs = {name: factors.shape for name, factors in stored.items()}
    theirs |= {name: files.modules_to_save.shape(name) for name in files.modules_to_save}
    for name, shape in shapes.items():
        if name in theirs and theirs[name] != shape:
            raise ConfigError(
                f"{where} belongs to another base: {name} has shape {theirs[name]} there, and {shape} here"
            )
    for name in sorted(shapes.keys() ^ theirs.keys()):
        if name in shapes:
            raise ConfigError(f"{where} lacks {name}, which is to be trained here")
        raise ConfigError(f"{where} has {name}, which is no target here (other targets, or another base)")
    for name in pairs:
        require_strength(
            where, name, strength_of(adapter, name), Strength(stored[name].rank, stored[name].scaling)
        )


def _copy_rows(parameter: nn.Parameter, values: torch.Tensor) -> None:
    local, first = local_rows(parameter)
    local.copy_(values[first : first + len(local)])


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
    if targets.saved:
        names = " and ".join(f"`{name}`" for name in targets.saved)
        lines += [
            "",
            f"Beside the LoRA it holds {names} whole, as trained; PEFT puts them in place of the base's.",
            "Servers that take LoRA factors only refuse such an adapter: merge it, and serve the result.",
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
