"""axolotl's keys that are not keys here: what happens instead, in one line each, or why they are refused.

A key is noticed where it only touches speed, memory or reporting, and refused where leaving it out would
change what is learned or what is written. Keys that do run here are in schema.py; a key in neither place is
unknown.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Foreign:
    """Keys of axolotl that share one answer."""

    keys: tuple[str, ...]
    line: str
    refused: bool = False
    as_is: tuple[Any, ...] = (False,)  # values that ask for what happens anyway: they get no line

    def asks_for_nothing(self, value: Any) -> bool:
        return value in ([], {}, "") or any(
            type(value) is type(item) and value == item for item in self.as_is
        )


def notice(keys: str, line: str, as_is: tuple[Any, ...] = (False,)) -> Foreign:
    return Foreign(tuple(keys.split()), line, as_is=as_is)


def refuse(keys: str, line: str, as_is: tuple[Any, ...] = (False,)) -> Foreign:
    return Foreign(tuple(keys.split()), line, refused=True, as_is=as_is)


# One spelling inside: old or axolotl's own name -> the key that it sets here (dots go into sections).
RENAMED: dict[str, str] = {
    "adam_eps": "adam_epsilon",
    "bfloat16": "bf16",
    "chat_template_jinja": "chat_template",
    "evaluation_strategy": "eval_strategy",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_rank_pattern": "rank_pattern",
    "max_packed_sequence_len": "sequence_len",
    "ray_num_workers": "ray.num_workers",
    "resources_per_worker": "ray.resources_per_worker",
    "sequence_parallel_degree": "context_parallel_size",
}
RENAMED_IN_DATASETS: dict[str, str] = {
    "chat_template_jinja": "chat_template",
    "field_thinking": "message_property_mappings.reasoning_content",
    "message_field_content": "message_property_mappings.content",
    "message_field_role": "message_property_mappings.role",
}

# What `optimizer` may say, by what runs: AdamW with float32 states, or with states in 8 bits.
ADAMW_NAMES: dict[str, tuple[str, ...]] = {
    "adamw_torch": (
        *("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision"),
        *("paged_adamw", "paged_adamw_32bit", "flash_adamw", "optimi_adamw"),
    ),
    "adamw_8bit": (
        *("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_8bit"),
        *("ao_adamw_4bit", "ao_adamw_fp8", "paged_adamw_8bit"),
    ),
}
ADAMW_EXACTLY = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit")

KNOWN_PLUGINS: dict[str, str] = {
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": "the loss is already computed in chunks, "
    "without a matrix of all logits",
    "axolotl.integrations.liger.LigerPlugin": "the patched modules of this package run instead of liger's "
    "kernels",
    "axolotl.integrations.kernels.KernelsPlugin": "the experts run as grouped matrix products of this "
    "package",
}

FOREIGN_IN_DATASETS: tuple[Foreign, ...] = (
    notice("trust_remote_code", "never needed: no code of a dataset is run"),
    notice("preprocess_shards", "rows are always prepared a window at a time"),
    refuse(
        "template_thinking_key",
        "the reasoning reaches the template as reasoning_content; name another in message_property_mappings",
        ("reasoning_content",),
    ),
    refuse(
        "split_thinking field_human field_model input_format input_transform conversation "
        "step_separator max_completion_length train_on_last_step_only logprobs_field temperature skip",
        "not supported yet; write the rows in the form that the dataset's other keys describe, or choose "
        "them by split",
        (False, 0),
    ),
)


def lookup(table: tuple[Foreign, ...]) -> dict[str, Foreign]:
    """Key -> its entry."""
    return {key: entry for entry in table for key in entry.keys}
