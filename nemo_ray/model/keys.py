"""Every name mapping: parameters in memory, NVIDIA's checkpoint layout, PEFT's adapter files."""

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(.*\.experts)\.(up_proj|down_proj)")
_STORED_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


class Stored(NamedTuple):
    """Where a parameter lies in a checkpoint: one key, or one key for each expert, stacked on dim 0."""

    keys: tuple[str, ...]
    stacked: bool


def stored(name: str, num_experts: int) -> Stored:
    """NVIDIA's keys of the base parameter or buffer `name`, as `model.named_parameters()` names it."""
    name = re.sub(r"^model\.", "backbone.", name)
    if expert := _EXPERT.fullmatch(name):
        prefix, projection = expert.groups()
        return Stored(tuple(f"{prefix}.{index}.{projection}.weight" for index in range(num_experts)), True)
    return Stored((name,), False)


# Spellings that older transformers wrote, by the name that is right.
OLD_SPELLINGS = {"backbone.embeddings.weight": ("backbone.embedding.weight",)}


def is_unused(key: str) -> bool:
    """Checkpoint keys that training has no use for: the multi-token prediction head."""
    return key.startswith("mtp.")


PEFT_PREFIX = "base_model.model."


def peft_linear(name: str) -> str:
    """`...q_proj.lora_A` -> PEFT's key."""
    return f"{PEFT_PREFIX}{name}.weight"


def peft_expert(name: str, both: bool) -> str:
    """`...experts.up_lora_A` -> PEFT's key. PEFT nests its wrappers: where both projections have one,
    the one of up lies inside."""
    prefix, _, leaf = name.rpartition(".")
    side, factor = leaf.split("_", 1)
    nested = ".base_layer" if both and side == "up" else ""
    return f"{PEFT_PREFIX}{prefix}{nested}.{factor}.weight"


def from_peft(key: str) -> tuple[str, str | None]:
    """PEFT's key -> (module as PEFT nests it, "lora_A" or "lora_B"); (parameter, None) of any other tensor.

    The inverse of `peft_linear` and `peft_expert`, but for PEFT's nesting; NVIDIA's own names become ours.
    """
    name = re.sub(r"^backbone\.", "model.", key.removeprefix(PEFT_PREFIX))
    if factor := re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name):
        return factor.group(1), factor.group(2)
    return name, None


def in_memory(key: str) -> tuple[str, int | None]:
    """NVIDIA's key -> the parameter's name in memory, and its row of a stacked one. Inverse of `stored`."""
    for right, old_names in OLD_SPELLINGS.items():
        key = right if key in old_names else key
    name = re.sub(r"^backbone\.", "model.", key)
    if expert := _STORED_EXPERT.fullmatch(name):
        prefix, index, projection = expert.groups()
        return f"{prefix}.{projection}", int(index)
    return name, None
