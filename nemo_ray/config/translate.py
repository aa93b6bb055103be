"""From what a YAML may say to what the schema knows: one spelling a key, one line for an axolotl key.

Owns the folding of old and axolotl's own spellings. Types, and rules between keys, are checked afterwards.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import isdir
from typing import Any

from nemo_ray.config.axolotl import (
    ADAMW_EXACTLY,
    ADAMW_NAMES,
    FOREIGN_IN_DATASETS,
    KNOWN_PLUGINS,
    RENAMED,
    RENAMED_IN_DATASETS,
    Foreign,
    lookup,
)
from nemo_ray.config.axolotl_keys import FOREIGN
from nemo_ray.config.dataset_folds import fold_pretraining, fold_type
from nemo_ray.urls import redact

Raw = dict[str, Any]
DATASET_KEYS = ("datasets", "test_datasets")
_FORMATS = ("json", "csv", "parquet", "arrow", "text")


@dataclass
class Findings:
    """What reading turned up, one line each, in the order of the YAML."""

    errors: list[str] = field(default_factory=list)  # wrong whatever the version
    refusals: list[str] = field(default_factory=list)  # what this version cannot do
    notices: list[str] = field(default_factory=list)


def show(value: Any) -> str:
    """A value as the YAML may have it, short enough for one line."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = redact(" ".join(text.split())) or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def drop_absent(value: Any) -> Any:
    """A key without a value counts as absent, at any depth."""
    if isinstance(value, dict):
        return {key: drop_absent(item) for key, item in value.items() if item is not None}
    return [drop_absent(item) for item in value] if isinstance(value, list) else value


def keys_that_swallowed_a_value(value: Any, path: str = "") -> list[str]:
    """One line for each `{key:1}`: without a space after the colon YAML reads a longer key, and no value."""
    if isinstance(value, list):
        return [line for item in value for line in keys_that_swallowed_a_value(item, path)]
    if not isinstance(value, dict):
        return []
    lines = []
    for key, item in value.items():
        name, colon, swallowed = str(key).partition(":")
        if item is None and colon and swallowed:
            lines.append(
                f"{path}{key}: has no value, since YAML wants a space there; write `{name}: {swallowed}`"
            )
        lines += keys_that_swallowed_a_value(item, f"{path}{key}.")
    return lines


def canonical_key(key: str) -> str:
    """The one spelling of a dotted key."""
    if key in RENAMED:
        return RENAMED[key]
    parts = key.split(".")
    if len(parts) == 3 and parts[0] in DATASET_KEYS and parts[2] in RENAMED_IN_DATASETS:
        return ".".join((*parts[:2], RENAMED_IN_DATASETS[parts[2]]))
    return key


def rename_keys(raw: Raw) -> list[str]:
    """Give every key its one spelling, in place; returns errors for keys set twice, with two values."""
    for name in DATASET_KEYS:
        if isinstance(raw.get(name), dict):
            raw[name] = [raw[name]]  # a single dataset without a list
    errors = _rename(raw, RENAMED, "")
    for name, index, entry in dataset_entries(raw):
        errors += _rename(entry, RENAMED_IN_DATASETS, f"{name}.{index}.")
    return errors


def _rename(raw: Raw, renamed: dict[str, str], prefix: str) -> list[str]:
    errors = []
    for old in [key for key in raw if key in renamed]:
        value = raw.pop(old)
        *folder, last = renamed[old].split(".")
        target = raw
        for part in folder:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if value is None or not isinstance(target, dict):
            continue  # absent, or a wrong type that is reported for the section itself
        present = target.get(last)
        if present not in (None, value) and (old, present) != ("chat_template_jinja", "jinja"):
            errors.append(
                f"{prefix}{old}: {show(value)} contradicts {prefix}{renamed[old]}: {show(present)}; "
                "they mean the same, keep one"
            )
        target[last] = value
    return errors


def dataset_entries(raw: Raw) -> list[tuple[str, int, Raw]]:
    """(key, index, entry) of every entry of the dataset lists that is a map."""
    return [
        (name, index, entry)
        for name in DATASET_KEYS
        if isinstance(raw.get(name), list)
        for index, entry in enumerate(raw[name])
        if isinstance(entry, dict)
    ]


def translate(raw: Raw) -> Findings:
    """Fold values and take axolotl's own keys out of `raw`, in place; says what was found."""
    found = Findings()
    for key, fold in _FOLDS.items():
        if key in raw:
            fold(raw, found)
    _take_foreign(raw, lookup(FOREIGN), "", found)
    for name, index, entry in dataset_entries(raw):
        _take_foreign(entry, lookup(FOREIGN_IN_DATASETS), f"{name}.{index}.", found)
        if entry.get("path") in _FORMATS and "data_files" in entry and not isdir(entry["path"]):
            # The hub library's way to name local files: a format for a path.
            entry.setdefault("ds_type", entry["path"])
            entry["path"] = "."
        found.errors += fold_type(entry, f"{name}.{index}.")
        mapping = entry.get("message_property_mappings")
        if isinstance(mapping, dict):
            entry["message_property_mappings"] = {"role": "role", "content": "content"} | mapping
    return found


def _take_foreign(raw: Raw, table: dict[str, Foreign], prefix: str, found: Findings) -> None:
    """Move axolotl's own keys into the findings; keys with one answer share a line."""
    noticed: dict[str, list[str]] = {}
    for key in [key for key in raw if key in table]:
        value, entry = raw.pop(key), table[key]
        if entry.asks_for_nothing(value):
            continue
        if entry.refused:
            found.refusals.append(f"{prefix}{key}: {show(value)} is refused: {entry.line}")
        else:
            noticed.setdefault(entry.line, []).append(prefix + key)
    found.notices += [f"{', '.join(keys)}: {line}" for line, keys in noticed.items()]


def _fold_adapter(raw: Raw, found: Findings) -> None:
    if raw["adapter"] in ("", "none", "None", "null"):
        del raw["adapter"]


def _fold_optimizer(raw: Raw, found: Findings) -> None:
    name = raw["optimizer"]
    runs = next((runs for runs, names in ADAMW_NAMES.items() if name in names), None)
    if runs is not None:
        raw["optimizer"] = runs
        if name not in ADAMW_EXACTLY:
            states = "states in 8 bits (bitsandbytes)" if runs == "adamw_8bit" else "float32 states"
            found.notices.append(f"optimizer: {name} runs as AdamW with {states}")
    elif isinstance(name, str):
        known = ", ".join(name for names in ADAMW_NAMES.values() for name in names)
        found.errors.append(
            f"optimizer: {show(name)} is not known; only AdamW runs here, by any of these names: {known}"
        )
        del raw["optimizer"]


def _fold_targets(raw: Raw, found: Findings) -> None:
    if raw["lora_target_modules"] == "all-linear":  # PEFT's spelling
        del raw["lora_target_modules"]
        raw["lora_target_linear"] = True


# Starts of a LoRA that PEFT has and this package has not, by the beginning of their names.
_CHANGES_BASE = "takes the first product of the factors off the base's weights"
_OTHER_STARTS = {
    "pissa": _CHANGES_BASE,
    "olora": _CHANGES_BASE,
    "loftq": _CHANGES_BASE,
    "corda": f"{_CHANGES_BASE}, after a pass over data",
    "lora_ga": f"{_CHANGES_BASE}, after a pass over data",
    "eva": "needs a pass over data first",
    "mica": "freezes B, and trains A alone",
    "false": "makes the adapter act before it is trained, which is meant for debugging",
}


def _fold_init(raw: Raw, found: Findings) -> None:
    value = raw["peft_init_lora_weights"]
    name = str(value).lower()
    for start, reason in _OTHER_STARTS.items():
        if isinstance(value, (str, bool)) and name.startswith(start):
            del raw["peft_init_lora_weights"]
            found.refusals.append(
                f"peft_init_lora_weights: {show(value)} is refused: it {reason}; use true, gaussian or "
                "orthogonal"
            )
            return


def _fold_checkpointing(raw: Raw, found: Findings) -> None:
    if raw["gradient_checkpointing"] == "offload":
        found.notices.append(
            "gradient_checkpointing: offload runs as auto: what does not fit on the GPU goes to the host's "
            "memory, as far as there is time for it"
        )
        raw["gradient_checkpointing"] = "auto"
    if raw["gradient_checkpointing"] in ("unsloth", "offload_disk"):
        value = raw["gradient_checkpointing"]
        found.notices.append(
            f"gradient_checkpointing: {value} runs as true: activations are recomputed, and not moved "
            "elsewhere"
        )
        raw["gradient_checkpointing"] = True


def _fold_precision(raw: Raw, found: Findings) -> None:
    if raw.get("bf16") == "full":
        raw["bf16"] = True
    if raw.get("tf32") == "auto":
        raw["tf32"] = True


def _fold_resume(raw: Raw, found: Findings) -> None:
    if raw.get("resume_from_checkpoint") is False:
        del raw["resume_from_checkpoint"]
    elif raw.get("resume_from_checkpoint") is True:
        raw["resume_from_checkpoint"] = "auto"
    automatic = raw.pop("auto_resume_from_checkpoints", False)
    if not isinstance(automatic, bool):
        found.errors.append(
            f"auto_resume_from_checkpoints: {show(automatic)} is not valid; give true or false"
        )
    elif automatic:
        raw.setdefault("resume_from_checkpoint", "auto")


def _fold_grad_norm(raw: Raw, found: Findings) -> None:
    value = raw["max_grad_norm"]
    if value == 0 and not isinstance(value, bool):
        raw["max_grad_norm"] = None


def _fold_plugins(raw: Raw, found: Findings) -> None:
    plugins = raw.pop("plugins")
    for name in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(name, str) and name in KNOWN_PLUGINS:
            found.notices.append(f"plugins: {name} is not loaded: {KNOWN_PLUGINS[name]}")
        else:
            found.errors.append(
                f"plugins: {show(name)} is not known and no plugin code is run here; remove it "
                f"(accepted: {', '.join(item.rsplit('.', 1)[-1] for item in KNOWN_PLUGINS)})"
            )


def _fold_pretraining(raw: Raw, found: Findings) -> None:
    found.errors += fold_pretraining(raw)


def _fold_strategy(key: str, steps: str, per_epoch: str, never: str) -> Callable[[Raw, Findings], None]:
    def fold(raw: Raw, found: Findings) -> None:
        value = raw.pop(key)
        if value == "epoch":
            if steps not in raw:
                raw.setdefault(per_epoch, 1)
        elif value in ("no", False):  # YAML reads a bare `no` as false
            raw.pop(steps, None)
            raw.pop(per_epoch, None)
            found.notices.append(f"{key}: no: {never}")
        elif value != "steps":
            found.errors.append(f"{key}: {show(value)} is not valid; give steps, epoch or no")

    return fold


_FOLDS: dict[str, Callable[[Raw, Findings], None]] = {
    "adapter": _fold_adapter,
    "optimizer": _fold_optimizer,
    "lora_target_modules": _fold_targets,
    "peft_init_lora_weights": _fold_init,
    "gradient_checkpointing": _fold_checkpointing,
    "bf16": _fold_precision,
    "tf32": _fold_precision,
    "resume_from_checkpoint": _fold_resume,
    "auto_resume_from_checkpoints": _fold_resume,
    "max_grad_norm": _fold_grad_norm,
    "plugins": _fold_plugins,
    "pretraining_dataset": _fold_pretraining,
    "eval_strategy": _fold_strategy(
        "eval_strategy",
        "eval_steps",
        "evals_per_epoch",
        "held-out data, if any, is evaluated at step 0 and at the end only",
    ),
    "save_strategy": _fold_strategy(
        "save_strategy",
        "save_steps",
        "saves_per_epoch",
        "a checkpoint is written only at the end and when the run is stopped",
    ),
}

# Keys of axolotl that are folded into others, beside the renamed ones: what they do here.
FOLDED_KEYS: dict[str, str] = {
    "auto_resume_from_checkpoints": "`true` is `resume_from_checkpoint: auto`",
    "eval_strategy": "`epoch` is `evals_per_epoch: 1`, `steps` is `eval_steps`, `no` leaves only the first "
    "and last",
    "plugins": "known names get one line each, unknown ones are an error; no plugin code is run",
    "pretraining_dataset": "its entries become datasets of `type: pretrain`; `text_column` is their `field`",
    "save_strategy": "`epoch` is `saves_per_epoch: 1`, `steps` is `save_steps`, `no` leaves only the last",
}
