"""Which layers a Nemotron-H has, from config.json alone, and what an adapter names of them. Pure; no torch.

The driver checks the names before anything is started or replaced; the model side applies the same rules to
the modules themselves. The rules are PEFT's, so that a written adapter_config.json means the same there.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import ConfigError
from nemo_ray.storage import read_json

Value = TypeVar("Value", int, float)
Shape = Mapping[str, Any]
"""A model's config.json."""

# The linear layers of `lora_target_linear: true`. The router, head and embeddings are never among them.
LINEAR_NAMES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj",
    "out_proj",
    "up_proj",
    "down_proj",
    "fc1_latent_proj",
    "fc2_latent_proj",
)
# What may be trained whole beside a LoRA: name in lora_modules_to_save -> path of the module.
SAVED_MODULES = {"embeddings": "model.embeddings", "lm_head": "lm_head"}
# What recipes for other models name.
_ABSENT = {
    "gate_proj": "experts and MLPs have no gate here (relu squared): up_proj and down_proj are all there is",
    "gate_up_proj": "experts have no gate here (relu squared), and up_proj of its own",
    "qkv_proj": "attention has q_proj, k_proj and v_proj here",
    "x_proj": "Mamba-2 makes all of its inputs in in_proj",
    "dt_proj": "Mamba-2 makes all of its inputs in in_proj",
}
_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_SIZES = {
    "linear_attention": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "full_attention": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "moe": (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "mlp": ("intermediate_size",),
}
_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def read_shape(base_model: str) -> Shape:
    """config.json of the model folder.

    Raises: ConfigError where it lacks a size that the blocks need.
    """
    path = Path(base_model) / "config.json"
    shape: Shape = read_json(path)
    kinds = shape.get("layers_block_type") or [
        _LETTERS.get(letter, letter) for letter in shape.get("hybrid_override_pattern", "")
    ]
    unknown = {_OLD_KINDS.get(kind, kind) for kind in kinds} - _SIZES.keys()
    if not kinds or unknown:
        found = f"blocks of kind {', '.join(sorted(unknown))}" if unknown else "no blocks"
        raise ConfigError(f"base_model: {path} has {found}: see layers_block_type or hybrid_override_pattern")
    wanted = {"hidden_size", "vocab_size", *(size for kind in block_types(shape) for size in _SIZES[kind])}
    missing = sorted(wanted - shape.keys())
    if missing:
        raise ConfigError(
            f"base_model: {path} lacks {', '.join(missing)}; is it the config.json of the model?"
        )
    return shape


def block_types(shape: Shape) -> list[str]:
    """Kind of each block: `layers_block_type`, or what `hybrid_override_pattern` spells."""
    if shape.get("layers_block_type"):
        return [_OLD_KINDS.get(kind, kind) for kind in shape["layers_block_type"]]
    return [_LETTERS[letter] for letter in shape["hybrid_override_pattern"]]


def linear_paths(shape: Shape) -> list[str]:
    """Paths of all linear layers but the head, as `model.named_modules()` has them."""
    latent = ["fc1_latent_proj", "fc2_latent_proj"] if shape.get("moe_latent_size") else []
    inside = {
        "linear_attention": ["in_proj", "out_proj"],
        "full_attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "moe": ["shared_experts.up_proj", "shared_experts.down_proj", *latent],
        "mlp": ["up_proj", "down_proj"],
    }
    kinds = enumerate(block_types(shape))
    return [f"model.layers.{number}.mixer.{name}" for number, kind in kinds for name in inside[kind]]


def expert_paths(shape: Shape) -> list[str]:
    """Paths of the routed experts' 3-D parameters."""
    moe = [number for number, kind in enumerate(block_types(shape)) if kind == "moe"]
    return [f"model.layers.{number}.mixer.experts.{side}_proj" for number in moe for side in ("up", "down")]


def find_targets(
    adapter: AdapterSection, linears: Iterable[str], banks: Iterable[str]
) -> tuple[list[str], list[str]]:
    """(linear layers, expert parameters) that `adapter` names among those given by path, sorted.

    Raises: ConfigError for a target or a pattern that matches nothing, or a target that cannot carry LoRA; it
        lists near names.
    """
    linears = list(linears)
    wanted = adapter.lora_target_modules
    _refuse_untargetable(wanted)
    modules = _matches("lora_target_modules", wanted, linears)
    if adapter.lora_target_linear:
        modules |= {path for path in linears if path.rpartition(".")[2] in LINEAR_NAMES}
    parameters = _matches("lora_target_parameters", adapter.lora_target_parameters, banks)
    if not modules and not parameters:
        raise ConfigError(
            "adapter: lora needs a target: set lora_target_modules, lora_target_linear or "
            "lora_target_parameters"
        )
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        _check_patterns(key, patterns, modules | parameters)
    _check_ranks(adapter, sorted(modules | parameters))
    return sorted(modules), sorted(parameters)


def _refuse_untargetable(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        name = pattern.rpartition(".")[2]
        if name == "conv1d":
            raise ConfigError(
                "lora_target_modules: conv1d cannot carry LoRA: the Mamba-2 kernels read its weight "
                "directly; target in_proj and out_proj instead"
            )
        if name in SAVED_MODULES or name == "embed_tokens":
            saved = name if name in SAVED_MODULES else "embeddings"
            raise ConfigError(
                f"lora_target_modules: {pattern} carries no LoRA here; train it whole with "
                f"`lora_modules_to_save: [{saved}]`"
            )


def _matches(key: str, patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """PEFT's rule: a pattern is a whole path, the end of one after a dot, or a regular expression for it."""
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        hits = {path for path in paths if path == pattern or path.endswith("." + pattern)}
        if not hits and re.search(r"[\\*+?\[(|^$]", pattern):
            expression = _compiled(key, pattern, pattern)
            hits = {path for path in paths if expression.fullmatch(path)}
        if not hits:
            told = _ABSENT.get(pattern.rsplit(".", 1)[-1]) or _near(pattern, paths)
            raise ConfigError(f"{key}: {pattern!r} matches nothing in this model; {told}")
        found |= hits
    return found


def _compiled(key: str, pattern: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def _near(pattern: str, paths: list[str]) -> str:
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", path) for path in paths})
    names = kinds + [kind.rpartition(".")[2] for kind in kinds]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(dict.fromkeys(near))}"
    return f"there are {', '.join(kinds)}" if kinds else "it has no routed experts"


class Strength(NamedTuple):
    """How much a target's factors can do: their rank, and what their product is multiplied by."""

    rank: int
    scaling: float


def strength_of(adapter: AdapterSection, path: str) -> Strength:
    """Of the target at `path`, a linear layer or an expert parameter.

    The scaling is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """
    rank = _by_pattern("rank_pattern", adapter.rank_pattern, path, adapter.lora_r)
    alpha = alpha_of(adapter, path)
    return Strength(rank, alpha / (math.sqrt(rank) if adapter.peft_use_rslora else rank))


def alpha_of(adapter: AdapterSection, path: str) -> float:
    """lora_alpha of the target at `path`."""
    return _by_pattern("alpha_pattern", adapter.alpha_pattern, path, adapter.lora_alpha)


def _by_pattern(key: str, patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """PEFT's rule: the first pattern that matches the path's end, from its start or after a dot."""
    for pattern, value in patterns.items():
        if _ending(key, pattern).match(path):
            return value
    return default


def _ending(key: str, pattern: str) -> re.Pattern[str]:
    return _compiled(key, pattern, rf"(.*\.)?({pattern})$")


def _check_patterns(key: str, patterns: Mapping[str, float], targets: Iterable[str]) -> None:
    targets = sorted(targets)
    for pattern in patterns:
        expression = _ending(key, pattern)
        if not any(expression.match(path) for path in targets):
            raise ConfigError(f"{key}: {pattern!r} matches no target; {_near(pattern, targets)}")


def _check_ranks(adapter: AdapterSection, targets: Iterable[str]) -> None:
    if adapter.peft_init_lora_weights != "orthogonal" or adapter.lora_model_dir:
        return
    for path in targets:
        rank = strength_of(adapter, path).rank
        if rank % 2:
            raise ConfigError(
                f"peft_init_lora_weights: orthogonal needs even ranks, and {path} has rank {rank}; change "
                "lora_r or rank_pattern"
            )


def saved_modules(adapter: AdapterSection) -> dict[str, str]:
    """Name -> path of the modules that are trained whole beside the LoRA.

    Raises: ConfigError for one that cannot be.
    """
    for name in adapter.lora_modules_to_save:
        if name not in SAVED_MODULES:
            raise ConfigError(
                f"lora_modules_to_save: {name!r} cannot be trained whole beside a LoRA; there are "
                f"{', '.join(SAVED_MODULES)}"
            )
    return {name: SAVED_MODULES[name] for name in sorted(adapter.lora_modules_to_save)}
