"""CSV and TSV as Python's csv module reads them, strictly, row by row with the bytes that each takes.

The same reader finds the rows and reads them, so that a line break within quotes is part of its row in both.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nemo_ray.data.index import BLANK_LINE
from nemo_ray.data.manifest import FileFormat
from nemo_ray.data.template import RowError
from nemo_ray.errors import DataError

DELIMITERS: dict[FileFormat, str] = {"csv": ",", "tsv": "\t"}

_LONGEST_FIELD = 16 << 20
"""Characters. A quote that is never closed ends here, not at the end of the file."""

_BOM = b"\xef\xbb\xbf"


class Header(NamedTuple):
    """The first row, and its bytes."""

    names: tuple[str, ...]
    size_bytes: int


def csv_rows(lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str] | RowError]]:
    """(bytes, fields) of each row. Bytes that are no UTF-8 come as lone surrogates."""
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        size = 0
        try:
            fields: list[str] | RowError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            fields = RowError("invalid CSV", str(error))
        yield size, fields


def header_of(lines: Iterator[bytes], delimiter: str, path: str) -> Header:
    """The names of the fields; `lines` is left at the first row. Raises DataError."""
    first = next(lines, b"")
    bom = len(_BOM) if first.startswith(_BOM) else 0

    def without_bom() -> Iterator[bytes]:
        yield first[bom:]
        yield from lines

    size, names = next(csv_rows(without_bom(), delimiter), (0, []))
    if isinstance(names, RowError):
        raise DataError(f"{path}: its first row is no valid CSV header: {names.detail}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: its header names the column {twice[0]!r} twice; rename one")
    return Header(tuple(names), size + bom)


def parse_csv(data: bytes, delimiter: str, names: Sequence[str]) -> list[Any]:
    """Rows as name -> text, or RowError."""
    try:
        data.decode()
        valid = True
    except UnicodeDecodeError:
        valid = False
    # io.BytesIO cuts after line feeds only, as files are read.
    return [_row(fields, names, valid) for _, fields in csv_rows(io.BytesIO(data), delimiter)]


def _row(fields: list[str] | RowError, names: Sequence[str], valid: bool) -> Any:
    if isinstance(fields, RowError):
        return fields
    if not fields:
        return RowError(BLANK_LINE)
    if len(fields) != len(names):
        return RowError("wrong number of fields", f"{len(fields)}, and the header has {len(names)}")
    if not valid and any("\udc80" <= letter <= "\udcff" for field in fields for letter in field):
        return RowError("invalid UTF-8")
    return dict(zip(names, fields, strict=True))
