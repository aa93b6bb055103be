"""One data file: how many rows it has, where they lie, and how a span of them is read.

Owns the formats JSON lines, JSON array and Parquet. Which files and rows a run takes is sources.py's.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_ray.data.manifest import FileFormat, Span, digest
from nemo_ray.data.template import RowError
from nemo_ray.errors import ConfigError, DataError

RUN_ROWS = 16
"""Rows are addressed, and held out, in runs of this many."""

BLANK_LINE = "blank line"

_CHUNK_BYTES = 16 << 20
_HASHED_BYTES = 64 << 20
"""Smaller files are identified by their content, larger ones by name, size and time of change."""

_LARGEST_ARRAY_BYTES = 512 << 20


class FileIndex(Protocol):
    """What a scan found."""

    @property
    def num_rows(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """Address the rows [first_row, first_row + num_rows)."""
        ...


def scan(path: str, name: str, file_format: FileFormat) -> FileIndex:
    """Read a file once (parquet: its footer). Raises ConfigError or DataError."""
    try:
        if file_format == "parquet":
            return _scan_parquet(path, name)
        return _scan_array(path) if file_format == "json" else _scan_lines(path, name)
    except OSError as error:
        raise ConfigError(f"datasets: {path} cannot be read: {error.strerror or error}") from None


def sniff_json(path: str) -> FileFormat:
    """Is this .json file an array, or one object a line? An empty file counts as lines."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head.startswith(b"["):
            return "json"
        first_line = head.split(b"\n", 1)[0]
        if head and b"\n" in head and not _is_json(first_line):
            raise DataError(f"{path} is neither a JSON array of rows nor one JSON object a line")
    return "jsonl"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# -- JSON lines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinesIndex:
    """Byte offsets of every 16th line."""

    path: str
    num_rows: int
    identity: str
    size_bytes: int
    offsets: npt.NDArray[np.int64]

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex."""
        return Span(file, self._offset(first_row), self._offset(first_row + num_rows), first_row, num_rows)

    def _offset(self, row: int) -> int:
        if row >= self.num_rows:
            return self.size_bytes
        offset = int(self.offsets[row // RUN_ROWS])
        if row % RUN_ROWS:
            with open(self.path, "rb") as file:
                file.seek(offset)
                offset += sum(len(file.readline()) for _ in range(row % RUN_ROWS))
        return offset


def _scan_lines(path: str, name: str) -> LinesIndex:
    status = os.stat(path)
    hashed = hashlib.blake2b(digest_size=16) if status.st_size < _HASHED_BYTES else None
    starts: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    newlines, position, last = 0, 0, b"\n"
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            if hashed is not None:
                hashed.update(chunk)
            found = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            # Newline number 16, 32, ... (counted from 1) is followed by the first row of a run.
            starts.append(found[RUN_ROWS - 1 - newlines % RUN_ROWS :: RUN_ROWS] + (position + 1))
            newlines += len(found)
            position += len(chunk)
            last = chunk[-1:]
    identity = digest(name, position, status.st_mtime_ns) if hashed is None else hashed.hexdigest()
    num_rows = newlines + (last != b"\n")
    return LinesIndex(path, num_rows, identity, position, np.concatenate(starts))


def _read_lines(path: str, span: Span) -> list[Any]:
    with open(path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) != span.num_rows or len(data) != span.stop - span.start:
        raise DataError(f"{path} has changed since this run's data was planned; start the run again")
    return [_parse_line(line) for line in lines]


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return RowError("invalid JSON", str(error)) if line.strip() else RowError(BLANK_LINE)


# -- JSON array -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayIndex:
    """A file that is parsed whole; rows are the array's elements."""

    num_rows: int
    identity: str

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex."""
        return Span(file, first_row, first_row + num_rows, first_row, num_rows)


def _scan_array(path: str) -> ArrayIndex:
    size = os.path.getsize(path)
    if size > _LARGEST_ARRAY_BYTES:
        raise ConfigError(
            f"datasets: {path} is one JSON array of {size >> 20} MiB; write one object a line instead"
        )
    return ArrayIndex(
        len(_load_array(path, size)), hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    )


@lru_cache(maxsize=1)
def _load_array(path: str, size_bytes: int) -> list[Any]:
    """`size_bytes` is there to read again a file that has changed."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON: {error}") from None
    assert isinstance(value, list)
    return value


# -- Parquet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetIndex:
    """`starts`: first row of each row group, then the number of rows."""

    identity: str
    starts: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return self.starts[-1]

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex; `start`, `stop` are the row groups that hold the rows."""
        start = int(np.searchsorted(self.starts, first_row, side="right")) - 1
        stop = int(np.searchsorted(self.starts, first_row + num_rows, side="left"))
        return Span(file, start, stop, first_row, num_rows)


def _scan_parquet(path: str, name: str) -> ParquetIndex:
    status = os.stat(path)
    try:
        footer = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no valid Parquet file: {error}") from None
    metadata = footer.metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if status.st_size < _HASHED_BYTES:
        identity = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    else:
        identity = digest(name, status.st_size, status.st_mtime_ns)
    starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    return ParquetIndex(identity, tuple(int(start) for start in starts), tuple(footer.schema_arrow.names))


def _read_groups(path: str, span: Span, columns: list[str]) -> list[Any]:
    try:
        with pq.ParquetFile(path) as file:
            before = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            present = [name for name in columns if name in file.schema_arrow.names]
            table = file.read_row_groups(
                list(range(span.start, span.stop)), columns=present, use_threads=False
            )
            rows: list[Any] = table.slice(span.first_row - before, span.num_rows).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowIndexError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(rows) != span.num_rows:
        raise DataError(f"{path} has changed since this run's data was planned; start the run again")
    return rows


def read_span(path: str, file_format: FileFormat, span: Span, columns: list[str]) -> list[Any]:
    """The rows of a span in order, each decoded, or RowError where it cannot be. Raises DataError.

    `columns` are those that a parquet file is read for; others are not decoded.
    """
    try:
        if file_format == "parquet":
            return _read_groups(path, span, columns)
        if file_format == "json":
            return _load_array(path, os.path.getsize(path))[span.start : span.stop]
        return _read_lines(path, span)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
