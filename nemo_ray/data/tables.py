"""Files of columns: Parquet and Arrow IPC (both its file and its stream form, which `datasets` saves).

Lists of numbers come as NumPy arrays, one a row; everything else as plain Python values.
"""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_ray.data.index import changed, is_read_error
from nemo_ray.data.manifest import FileFormat
from nemo_ray.data.window_list import Span
from nemo_ray.errors import DataError
from nemo_ray.storage import is_url, open_input

TABLE_FORMATS: tuple[FileFormat, ...] = ("parquet", "arrow")

_ARROW_FILE = b"ARROW1"
"""An Arrow file begins with this; a stream begins with its schema."""

_BROKEN = (pa.ArrowException, OSError, EOFError)
"""What pyarrow raises for damaged files; ArrowInvalid is a ValueError, ArrowIOError is OSError."""


@dataclass(frozen=True)
class TableIndex:
    """`starts`: first row of each row group or record batch, then the number of rows."""

    identity: str
    starts: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return self.starts[-1]

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex; `start`, `stop` are the groups that hold the rows."""
        start = bisect.bisect_right(self.starts, first_row) - 1
        stop = bisect.bisect_left(self.starts, first_row + num_rows)
        return Span(file, start, stop, first_row, num_rows)

    def content(self, span: Span) -> str:
        """See FileIndex."""
        return self.identity


def scan_table(path: str, file_format: FileFormat, identity: str) -> TableIndex:
    """Read the footer (an Arrow stream: the head of each batch). Raises DataError."""
    with _explained(path, file_format), _opened(path) as file:
        if file_format == "parquet":
            footer = pq.ParquetFile(file)
            rows = [footer.metadata.row_group(group).num_rows for group in range(footer.num_row_groups)]
            names = footer.schema_arrow.names
        else:
            schema, batches = _batches(file, path)
            names, rows = schema.names, [batch.num_rows for batch in batches]
    starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    return TableIndex(identity, tuple(int(start) for start in starts), tuple(names))


def _batches(file: Any, path: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The record batches of an Arrow file or stream in order; of a mapped file only their heads are read."""
    file.seek(0)
    head = file.read(len(_ARROW_FILE))
    file.seek(0)
    if head == _ARROW_FILE:
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    if is_url(path):
        raise DataError(
            f"{path} is an Arrow stream, which cannot be read in parts from there; write it as Parquet, or "
            "copy it to a folder"
        )
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file for pyarrow: mapped into memory where it is local, so that only what is used is read."""
    if is_url(path):
        with open_input(path) as stream, pa.PythonFile(stream, mode="r") as file:
            yield file
    else:
        with pa.memory_map(path) as file:
            yield file


@contextlib.contextmanager
def _explained(path: str, file_format: FileFormat, part: str = "") -> Iterator[None]:
    """Damage as one line that names the file and, where it is known, its part."""
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and is_read_error(error):
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        words = str(error).strip().splitlines() or [type(error).__name__]
        if part:
            raise DataError(f"{path}: {part} cannot be read ({words[0]}); write the file again") from None
        kind = "Parquet" if file_format == "parquet" else "Arrow"
        raise DataError(f"{path} is no valid {kind} file: {words[0]}") from None


# -- reading --------------------------------------------------------------------------------------


def read_table(
    path: str, file_format: FileFormat, spans: Sequence[Span], columns: Sequence[str]
) -> list[Any]:
    """The rows of spans, of those columns that are there. Raises DataError.

    Groups that several spans share are decoded once, where the spans follow each other.
    """
    read = _read_groups if file_format == "parquet" else _read_batches
    rows: list[Any] = []
    with _explained(path, file_format), _opened(path) as file:
        for _, within in groupby(spans, key=lambda span: (span.start, span.stop)):
            some = list(within)
            table, before = read(file, path, some[0], columns)
            for span in some:
                part = table.slice(span.first_row - before, span.num_rows)
                if part.num_rows != span.num_rows:
                    raise changed(path)
                rows += rows_of(part)
    return rows


def _read_groups(file: Any, path: str, span: Span, columns: Sequence[str]) -> tuple[pa.Table, int]:
    """The row groups of a span, and the number of rows before them."""
    # A file of Python's is not to be read by pyarrow's threads: one that still lets go of it when the
    # interpreter ends takes the process down (pyarrow 26: "terminate called without an active exception").
    source = pq.ParquetFile(file, pre_buffer=not is_url(path))
    if span.stop > source.num_row_groups:
        raise changed(path)
    present = [name for name in columns if name in source.schema_arrow.names]
    tables = []
    for group in range(span.start, span.stop):
        with _explained(path, "parquet", f"row group {group}"):
            tables.append(source.read_row_group(group, columns=present, use_threads=False))
    before = sum(source.metadata.row_group(group).num_rows for group in range(span.start))
    return pa.concat_tables(tables), before


def _read_batches(file: Any, path: str, span: Span, columns: Sequence[str]) -> tuple[pa.Table, int]:
    """The same of record batches."""
    schema, batches = _batches(file, path)
    before, taken = 0, []
    for number in range(span.stop):
        with _explained(path, "arrow", f"record batch {number}"):
            batch = next(batches, None)
        if batch is None:
            raise changed(path)
        if number < span.start:
            before += batch.num_rows
        else:
            taken.append(batch)
    table = pa.Table.from_batches(taken, schema)
    return table.select([name for name in columns if name in schema.names]), before


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as dicts: lists of numbers as NumPy arrays, everything else as Python values."""
    if table.num_columns == 0:
        return [{} for _ in range(table.num_rows)]
    columns = [_values(table.column(number)) for number in range(table.num_columns)]
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type):
        return [array for chunk in column.chunks for array in _arrays(chunk)]
    values: list[Any] = column.to_pylist()
    return values


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _arrays(chunk: pa.Array) -> list[Any]:
    """The lists of one chunk: views of one array where no number is missing; None for a missing list."""
    if chunk.values.null_count:
        values: list[Any] = chunk.to_pylist()
        return values
    numbers = chunk.values.to_numpy(zero_copy_only=False)
    offsets = chunk.offsets.to_numpy()
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), valid.tolist(), strict=True)
    return [numbers[start:stop] if there else None for start, stop, there in bounds]
