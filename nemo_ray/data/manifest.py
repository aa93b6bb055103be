"""What exists: sources, files, windows and the plan that a run pins; names of the files in the prepared
directory.

Owns the records and their JSON form. How windows are found is sources.py, how shards are written shards.py.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from nemo_ray.data.window_list import Window, WindowList
from nemo_ray.storage import join

FORMAT_VERSION = 2
"""Part of every window's key: raised whenever the same inputs would give another shard."""

FileFormat = Literal["jsonl", "json", "csv", "tsv", "text", "parquet", "arrow"]


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
    """Estimated from some rows (probe.py); rows that are dropped count as 0."""
    evaluation_only: bool
    weight: float | None = None
    """Its part of an epoch's tokens, relative to the other sources' weights; None: each row once an epoch."""

    def locate(self, row: int) -> tuple[str, int]:
        """(file, row in that file) of the source's row number `row`."""
        file = self.files[bisect_right(self.files, row, key=lambda file: file.first_row) - 1]
        return file.path, row - file.first_row


@dataclass(frozen=True)
class DataPlan:
    """Everything that fixes a run's data: pinned when the run begins, shared by its restarts and ranks."""

    directory: str
    fingerprint: str
    sequence_len: int
    windows: WindowList
    eval_windows: WindowList
    sources: tuple[SourceInfo, ...]
    notices: tuple[str, ...]
    pad_id: int

    @property
    def num_rows(self) -> int:
        """Rows of one training epoch, whether or not they survive preparation."""
        return int(self.windows.num_rows.sum())

    def shard_path(self, window: Window) -> str:
        """Path or URL where the shard of this window is, or will be."""
        return join(self.directory, shard_name(window))

    @property
    def failure_path(self) -> str:
        """Written by a pipeline that stopped; readers that wait for a shard poll it."""
        return join(self.directory, f"failed-{self.fingerprint}.json")

    @property
    def rejected_path(self) -> str:
        """The rows that were rejected, one JSON object a line."""
        return join(self.directory, f"rejected-{self.fingerprint}.jsonl")

    def locate(self, window: Window, index: int) -> tuple[str, int]:
        """(file, row in that file) of the window's row number `index`."""
        for span in window.spans:
            if index < span.num_rows:
                return self.sources[window.source].files[span.file].path, span.first_row + index
            index -= span.num_rows
        raise IndexError(f"window {window.key} has {window.num_rows} rows")

    def estimated_tokens(self, windows: WindowList) -> float:
        """Tokens of windows, known before they are prepared."""
        tokens_per_row = np.array([source.tokens_per_row for source in self.sources])
        return float((windows.num_rows * tokens_per_row[windows.sources]).sum())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` gives an equal plan."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **value,
            "windows": self.windows.to_json(),
            "eval_windows": self.eval_windows.to_json(),
            "sources": [asdict(source) for source in self.sources],
            "notices": list(self.notices),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataPlan":
        """The plan that `to_json` wrote."""
        return cls(
            **{
                **value,
                "windows": WindowList.from_json(value["windows"]),
                "eval_windows": WindowList.from_json(value["eval_windows"]),
                "sources": tuple(_source_from_json(source) for source in value["sources"]),
                "notices": tuple(value["notices"]),
            }
        )


def shard_name(window: Window) -> str:
    """Name of the window's shard in the prepared directory."""
    return f"{window.key}.arrow"


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
