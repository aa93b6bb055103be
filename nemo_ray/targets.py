"""Which layers a Nemotron-H has, from config.json alone, and which of them LoRA names. Pure; no torch.

The driver checks the names before anything is started or replaced; the model side applies the same rule to
the modules themselves.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import ConfigError
from nemo_ray.storage import read_json

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

    Raises: ConfigError for a target that matches nothing or that cannot carry LoRA; it lists near names.
    """
    linears = list(linears)
    wanted = adapter.lora_target_modules
    if any(pattern.rpartition(".")[2] == "conv1d" for pattern in wanted):
        raise ConfigError(
            "lora_target_modules: conv1d cannot carry LoRA: the Mamba-2 kernels read its weight directly; "
            "target in_proj and out_proj instead"
        )
    modules = _matches("lora_target_modules", wanted, linears)
    if adapter.lora_target_linear:
        modules |= {path for path in linears if path.rpartition(".")[2] in LINEAR_NAMES}
    parameters = _matches("lora_target_parameters", adapter.lora_target_parameters, banks)
    if not modules and not parameters:
        raise ConfigError(
            "adapter: lora needs a target: set lora_target_modules, lora_target_linear or "
            "lora_target_parameters"
        )
    return sorted(modules), sorted(parameters)


def _matches(key: str, patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """PEFT's rule: a pattern is a whole path, the end of one after a dot, or a regular expression for it."""
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        hits = {path for path in paths if path == pattern or path.endswith("." + pattern)}
        if not hits and re.search(r"[\\*+?\[(|^$]", pattern):
            try:
                hits = {path for path in paths if re.fullmatch(pattern, path)}
            except re.error as error:
                raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
        if not hits:
            raise ConfigError(f"{key}: {pattern!r} matches nothing in this model; {_near(pattern, paths)}")
        found |= hits
    return found


def _near(pattern: str, paths: list[str]) -> str:
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", path) for path in paths})
    names = kinds + [kind.rpartition(".")[2] for kind in kinds]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(dict.fromkeys(near))}"
    return f"there are {', '.join(kinds)}" if kinds else "it has no routed experts"
