"""What a data format is: the record that sources and prepare know it by, and how a row's fields are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import LoadedTokenizer

_SHAPES = ("type", "eot_tokens")


class Field(NamedTuple):
    """A field that every row must have, and the key that names it (None: its name is fixed)."""

    key: str | None
    name: str


@dataclass(frozen=True)
class Format:
    """One data format."""

    columns: Callable[[DatasetSpec], list[str]]
    """Fields of a row that are read."""
    required: Callable[[DatasetSpec], list[Field]]
    """Those without which a row cannot be used."""
    keys: tuple[str, ...]
    """Keys of a dataset's entry that shape its rows' samples."""
    reader: Callable[[DatasetSpec, LoadedTokenizer, bool], RowReader]
    """Made once a process, from the entry, the tokenizer and train_on_inputs. Raises ConfigError."""
    splits: bool = False
    """A text longer than sequence_len becomes several documents."""

    def settings(self, spec: DatasetSpec) -> dict[str, Any]:
        """The values of the keys that shape samples: part of a shard's identity."""
        return {key: getattr(spec, key) for key in (*_SHAPES, *self.keys) if key != "chat_template"}


def resolve(spec: DatasetSpec, data: DataSection) -> DatasetSpec:
    """The entry with what the top level says for every dataset."""
    return spec.model_copy(
        update={
            "chat_template_kwargs": {**data.chat_template_kwargs, **spec.chat_template_kwargs},
            "eot_tokens": spec.eot_tokens or data.eot_tokens,
            "streaming": spec.streaming or data.streaming,
        }
    )


def read_field(row: Any, name: str) -> Any:
    """The value of a field that must be there. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("the row is no object")
    value = row.get(name)
    if value is None:
        raise RowError(f"no field {name!r}")
    return value


def read_text(row: Any, name: str) -> str:
    """A field that holds text. Raises RowError."""
    text = read_field(row, name)
    if not isinstance(text, str):
        raise RowError(f"field {name!r} is no text")
    return text


def read_some_text(row: Any, name: str) -> str:
    """A field that holds text, and not the empty one. Raises RowError."""
    text = read_text(row, name)
    if not text:
        raise RowError(f"field {name!r} is empty")
    return text
