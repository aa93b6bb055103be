"""One data file: how many rows it has, where they lie, and how a span of them is read.

Owns the JSON array and the choice between formats; lines.py and tables.py have the others. Which files and
rows a run takes is sources.py's.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from nemo_ray.data.index import BLANK_LINE, RUN_ROWS, FileIndex, facts_of, whole_identity
from nemo_ray.data.lines import LINE_FORMATS, read_lines, scan_lines
from nemo_ray.data.manifest import FileFormat
from nemo_ray.data.tables import TABLE_FORMATS, read_table, scan_table
from nemo_ray.data.window_list import Span
from nemo_ray.errors import ConfigError, DataError
from nemo_ray.hub_datasets import local_path
from nemo_ray.storage import is_url, open_input

__all__ = ["BLANK_LINE", "RUN_ROWS", "FileIndex", "read_span", "read_spans", "scan", "sniff_json"]

_LARGEST_ARRAY_BYTES = 512 << 20
_SNIFFED_BYTES = 64 << 10


def scan(path: str, name: str, file_format: FileFormat, known_as: str | None = None) -> FileIndex:
    """Read a file once (Parquet: its footer). Raises ConfigError or DataError.

    `known_as`: its identity where that is known; else its content, or for what is not read whole, its facts.
    """
    try:
        facts = facts_of(path)
        if file_format in LINE_FORMATS:
            if known_as is None and is_url(path):
                known_as = whole_identity(path, name, facts)
            return scan_lines(path, file_format, facts, known_as)
        if file_format in TABLE_FORMATS:
            return scan_table(path, file_format, known_as or whole_identity(path, name, facts))
        return _scan_array(path, facts.size_bytes)
    except OSError as error:
        raise ConfigError(f"datasets: {path} cannot be read: {error.strerror or error}") from None


def read_span(path: str, file_format: FileFormat, span: Span, columns: list[str]) -> list[Any]:
    """The rows of a span in order, each decoded, or RowError where it cannot be. Raises DataError.

    `columns` are those that a Parquet or Arrow file is read for; others are not decoded. Lists of numbers
    come from there as NumPy arrays.
    """
    return read_spans(path, file_format, [span], columns)


def read_spans(path: str, file_format: FileFormat, spans: Sequence[Span], columns: list[str]) -> list[Any]:
    """The rows of several spans of a file, one after the other; see `read_span`."""
    path = local_path(path)
    try:
        if file_format in LINE_FORMATS:
            return [row for span in spans for row in read_lines(path, file_format, span)]
        if file_format in TABLE_FORMATS:
            return read_table(path, file_format, spans, columns)
        rows = _load_array(path, facts_of(path).size_bytes)
        return [row for span in spans for row in rows[span.start : span.stop]]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


# -- JSON array -----------------------------------------------------------------------------------


def sniff_json(path: str, named: FileFormat) -> FileFormat:
    """Is this file one JSON array, or one object a line? `named`: what its suffix says, `json` or `jsonl`.

    A .json file is told by its beginning. A .jsonl file is lines, the first of which may be as wrong as any
    other, unless it begins and ends as one array. An empty file counts as lines. Raises DataError.
    """
    with open_input(path) as file:
        head = file.read(_SNIFFED_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
        first_line, _, more = head.partition(b"\n")
        if head.startswith(b"["):
            if named == "json":
                return "json"
            is_row = bool(more.strip()) and _is_json(first_line)
            return "jsonl" if is_row or not _last_bytes(file).endswith(b"]") else "json"
    if named == "json" and more and not _is_json(first_line):
        raise DataError(
            f"{path} does not begin with a JSON array of rows, and its first line is no whole JSON object; "
            "write an array, or one object a line (of a .jsonl file, a broken line alone is rejected)"
        )
    return "jsonl"


def _last_bytes(file: BinaryIO) -> bytes:
    """The end of a file, without the blanks that follow it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SNIFFED_BYTES))
    return file.read().rstrip()


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class ArrayIndex:
    """A file that is parsed whole; rows are the array's elements."""

    num_rows: int
    identity: str

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex."""
        return Span(file, first_row, first_row + num_rows, first_row, num_rows)

    def content(self, span: Span) -> str:
        """See FileIndex."""
        return self.identity


def _scan_array(path: str, size_bytes: int) -> ArrayIndex:
    if size_bytes > _LARGEST_ARRAY_BYTES:
        raise ConfigError(
            f"datasets: {path} is one JSON array of {size_bytes >> 20} MiB; write one object a line instead"
        )
    identity = hashlib.blake2b(_bytes_of(path), digest_size=16).hexdigest()
    return ArrayIndex(len(_load_array(path, size_bytes)), identity)


def _bytes_of(path: str) -> bytes:
    with open_input(path) as file:
        return file.read()


@lru_cache(maxsize=1)
def _load_array(path: str, size_bytes: int) -> list[Any]:
    """`size_bytes` is there to read again a file that has changed."""
    try:
        value = json.loads(_bytes_of(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} begins with [ and is read as one JSON array, which is no valid JSON: {error}"
        ) from None
    assert isinstance(value, list)
    return value
