"""Every name mapping: parameters in memory, NVIDIA's checkpoint layout, PEFT's adapter files."""

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(.*\.experts)\.(up_proj|down_proj)")


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
