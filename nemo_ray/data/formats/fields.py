"""Are the fields there that a dataset's format needs? If not: which one, or which format, was meant."""

import difflib
from collections.abc import Sequence
from typing import Any

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.formats import format_of
from nemo_ray.data.formats.base import Field
from nemo_ray.data.template import RowError
from nemo_ray.errors import ConfigError

_TELLING = {
    "field_messages: messages": ("messages",),
    "field_messages: conversations, with message_property_mappings": ("conversations",),
    "type: tokenized": ("input_ids", "labels"),
    "type: prompt_completion": ("prompt", "completion"),
    "type: alpaca": ("instruction", "output"),
    "type: input_output": ("segments",),
}
"""Fields by which the rows of another format are known."""


def check_columns(spec: DatasetSpec, key: str, path: str, columns: Sequence[str]) -> None:
    """A file of columns has those that every row needs. Raises ConfigError; `key` is the dataset's."""
    for field in format_of(spec).required(spec):
        if field.name not in columns:
            raise ConfigError(
                f"{_place(key, field)}: {path} has no column {field.name!r}; it has {', '.join(columns)}"
                f"{_hint(field, columns, spec)}"
            )


def check_fields(spec: DatasetSpec, key: str, rejected: Sequence[RowError], row: Any) -> None:
    """A field that none of the `rejected` rows has is named wrongly: ConfigError. `row` is the first."""
    for field in format_of(spec).required(spec):
        if all(one.reason == f"no field {field.name!r}" for one in rejected):
            names = list(row) if isinstance(row, dict) else []
            raise ConfigError(
                f"{_place(key, field)}: no row of {spec.path} has a field {field.name!r}; the first row has "
                f"{', '.join(names) or 'none'}{_hint(field, names, spec)}"
            )


def _place(key: str, field: Field) -> str:
    return f"{key}.type" if field.key is None else f"{key}.{field.key}"


def _hint(field: Field, names: Sequence[str], spec: DatasetSpec) -> str:
    """What was probably meant, where a field is not among the `names` that there are; or nothing."""
    close = difflib.get_close_matches(field.name, names, n=1, cutoff=0.6)
    if close and field.key is not None:
        return f"; did you mean {close[0]!r}?"
    kinds = {**_TELLING, "type: completion": (spec.field,)}
    fitting = [kind for kind, telling in kinds.items() if all(name in names for name in telling)]
    return f"; is it {fitting[0]}?" if fitting else ""
