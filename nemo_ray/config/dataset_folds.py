"""axolotl's other ways to say what kind of rows a dataset has, folded into `type` and its keys.

Each function changes the raw configuration in place; those that check return one line per problem.
"""

from typing import Any

from nemo_ray.config.dataset_types import TYPE_KEYS

Raw = dict[str, Any]

_PROMPT_KEYS = TYPE_KEYS["alpaca"]

_OWN_PROMPT = {
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_prompt": "",
    "system_format": "{system}",
    "field_system": "system",
}
"""What axolotl takes for the keys that a `type` of one's own leaves out."""


def name_tokenized(entries: list[Raw]) -> None:
    """`type:` without a value is axolotl's way to say that the rows are tokenized already."""
    for entry in entries:
        if "type" in entry and entry["type"] in (None, ""):
            entry["type"] = "tokenized"


def fold_type(entry: Raw, prefix: str) -> list[str]:
    """A map as `type` describes a prompt in the user's own words: an `alpaca` row with other wording."""
    own = entry.get("type")
    if not isinstance(own, dict):
        return []
    entry["type"] = "alpaca"
    entry |= _OWN_PROMPT | {key: value for key, value in own.items() if key in _PROMPT_KEYS}
    return [
        f"{prefix}type.{key}: unknown key; give {', '.join(_PROMPT_KEYS)}"
        for key in own
        if key not in _PROMPT_KEYS
    ]


def fold_pretraining(raw: Raw) -> list[str]:
    """The entries of `pretraining_dataset` become datasets whose long texts are cut."""
    given, errors = raw.pop("pretraining_dataset"), []
    for number, entry in enumerate(given if isinstance(given, list) else [given]):
        place = f"pretraining_dataset.{number}"
        if isinstance(entry, str) and entry:
            entry = {"path": entry}
        if not isinstance(entry, dict):
            errors.append(f"{place}: {entry!r} is not valid; give a dataset: a map with a path")
            continue
        if entry.get("type", "pretrain") != "pretrain":
            errors.append(f"{place}.type: {entry['type']!r} is not pretrain; give such a dataset in datasets")
        changed = {"field" if key == "text_column" else key: value for key, value in entry.items()}
        if isinstance(raw.setdefault("datasets", []), list):
            raw["datasets"].append({**changed, "type": "pretrain"})
    return errors
