"""What exists: sources, files, windows and the plan that a run pins; names of the files in the prepared
directory.

Owns the records and their JSON form. How windows are found is sources.py, how shards are written shards.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

FORMAT_VERSION = 1
"""Part of every window's key: raised whenever the same inputs would give another shard."""

FileFormat = Literal["jsonl", "json", "csv", "tsv", "text", "parquet", "arrow"]


class Span(NamedTuple):
    """Consecutive rows of one file.

    `start`, `stop` address them: bytes of a file of lines (jsonl, csv, tsv, text), elements of a json array,
    row groups of a parquet file, record batches of an arrow file. `first_row` counts rows from the beginning
    of the file.
    """

    file: int
    start: int
    stop: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class FileInfo:
    """One file of a source; `first_row` is the number of rows in the source's files before it."""

    path: str
    name: str
    identity: str
    format: FileFormat
    num_rows: int
    first_row: int


@dataclass(frozen=True)
class SourceInfo:
    """One entry of `datasets` (or of `test_datasets`: `evaluation_only`)."""

    name: str
    type: str
    files: tuple[FileInfo, ...]
    num_rows: int
    held_out_rows: int
    rows_per_window: int
    tokens_per_row: float
    """Estimated from the first rows; rows that are dropped count as 0."""
    evaluation_only: bool
    weight: float = 1.0
    """Share of the trained tokens relative to the other sources, beside what its size gives."""


@dataclass(frozen=True)
class Window:
    """Rows that are prepared together into one shard: they are packed among themselves only."""

    source: int
    spans: tuple[Span, ...]
    num_rows: int
    key: str

    def source_rows(self, source: SourceInfo) -> "list[tuple[int, int]]":
        """(first row in the source, number of rows) of each span, in the window's order."""
        return [(source.files[span.file].first_row + span.first_row, span.num_rows) for span in self.spans]


@dataclass(frozen=True)
class DataPlan:
    """Everything that fixes a run's data: pinned when the run begins, shared by its restarts and ranks."""

    directory: str
    fingerprint: str
    sequence_len: int
    windows: tuple[Window, ...]
    eval_windows: tuple[Window, ...]
    sources: tuple[SourceInfo, ...]
    notices: tuple[str, ...]
    pad_id: int

    @property
    def num_rows(self) -> int:
        """Rows of one training epoch, whether or not they survive preparation."""
        return sum(window.num_rows for window in self.windows)

    def shard_path(self, window: Window) -> Path:
        """Where the shard of this window is, or will be."""
        return Path(self.directory) / f"{window.key}.arrow"

    @property
    def failure_path(self) -> Path:
        """Written by a pipeline that stopped; readers that wait for a shard poll it."""
        return Path(self.directory) / f"failed-{self.fingerprint}.json"

    @property
    def rejected_path(self) -> Path:
        """The rows that were rejected, one JSON object a line."""
        return Path(self.directory) / f"rejected-{self.fingerprint}.jsonl"

    def locate(self, window: Window, index: int) -> tuple[str, int]:
        """(file, row in that file) of the window's row number `index`."""
        for span in window.spans:
            if index < span.num_rows:
                return self.sources[window.source].files[span.file].path, span.first_row + index
            index -= span.num_rows
        raise IndexError(f"window {window.key} has {window.num_rows} rows")

    def estimated_tokens(self, window: Window) -> float:
        """Tokens of a window, known before it is prepared."""
        return window.num_rows * self.sources[window.source].tokens_per_row

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` gives an equal plan."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataPlan":
        """The plan that `to_json` wrote."""
        return cls(
            **{
                **value,
                "windows": tuple(window_from_json(window) for window in value["windows"]),
                "eval_windows": tuple(window_from_json(window) for window in value["eval_windows"]),
                "sources": tuple(_source_from_json(source) for source in value["sources"]),
                "notices": tuple(value["notices"]),
            }
        )


def window_from_json(value: dict[str, Any]) -> Window:
    """One window of a plan's JSON form."""
    return Window(**{**value, "spans": tuple(Span(*span) for span in value["spans"])})


def _source_from_json(value: dict[str, Any]) -> SourceInfo:
    return SourceInfo(**{**value, "files": tuple(FileInfo(**file) for file in value["files"])})


def digest(*parts: object, size: int = 16) -> str:
    """Hex blake2b of the parts' JSON: the same for equal values on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_listed)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def _listed(value: object) -> object:
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no stable JSON form")
