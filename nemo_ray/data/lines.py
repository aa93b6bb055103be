"""Files whose rows are found by their bytes: JSON lines, plain text, CSV and TSV.

One scan finds the row ends (CSV: outside quotes, by the parser that reads the rows later), and remembers the
place of every 16th row:

    bytes   |header| row 0 ... row 15 | row 16 ... row 31 | ...
    offsets        ^                  ^                   ^
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_ray.data.csv_rows import DELIMITERS, csv_rows, header_of, parse_csv
from nemo_ray.data.index import BLANK_LINE, RUN_ROWS, changed
from nemo_ray.data.manifest import FileFormat, digest
from nemo_ray.data.template import RowError
from nemo_ray.data.window_list import Span
from nemo_ray.storage import FileFacts, open_input

LINE_FORMATS: tuple[FileFormat, ...] = ("jsonl", "text", "csv", "tsv")

PARALLEL_BYTES = 64 << 20
"""Files from this size on are scanned by several threads."""

_CHUNK_BYTES = 8 << 20
_BLOCK_BYTES = 128 << 10
"""The content of a file is known block by block, so that rows added at its end change the last one only."""

_MAX_THREADS = 8
_DIGEST_BYTES = 16

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class LinesIndex:
    """`offsets`: of every 16th row. `blocks` (n, 16): digests of its blocks, none where `known_as` is."""

    path: str
    format: FileFormat
    num_rows: int
    size_bytes: int
    offsets: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.uint8]
    known_as: str | None

    @property
    def identity(self) -> str:
        """See FileIndex."""
        if self.known_as is not None:
            return self.known_as
        return hashlib.blake2b(self.blocks.tobytes(), digest_size=_DIGEST_BYTES).hexdigest()

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """See FileIndex; `start`, `stop` are bytes."""
        return Span(file, self._offset(first_row), self._offset(first_row + num_rows), first_row, num_rows)

    def content(self, span: Span) -> str:
        """See FileIndex."""
        if self.known_as is not None:
            return self.known_as
        held = self.blocks[span.start // _BLOCK_BYTES : -(-span.stop // _BLOCK_BYTES)]
        header = self.blocks[:1] if self.format in DELIMITERS else held[:0]
        return digest(held.tobytes().hex(), header.tobytes().hex())

    def _offset(self, row: int) -> int:
        if row >= self.num_rows:
            return self.size_bytes
        offset = int(self.offsets[row // RUN_ROWS])
        if row % RUN_ROWS:
            with open_input(self.path) as file:
                file.seek(offset)
                lines = iter(file.readline, b"")
                sizes = _sizes(lines, self.format)
                offset += sum(next(sizes) for _ in range(row % RUN_ROWS))
        return offset


def _sizes(lines: Iterable[bytes], file_format: FileFormat) -> Iterator[int]:
    """Bytes of each row."""
    if file_format in DELIMITERS:
        return (size for size, _ in csv_rows(lines, DELIMITERS[file_format]))
    return (len(line) for line in lines)


# -- the scan -------------------------------------------------------------------------------------


def scan_lines(path: str, file_format: FileFormat, facts: FileFacts, known_as: str | None) -> LinesIndex:
    """Read a file once. `known_as`: its identity where that is known without its content. Raises OSError."""
    if file_format in DELIMITERS:
        return _scan_csv(path, file_format, facts, known_as)
    threads = min(os.cpu_count() or 1, _MAX_THREADS) if facts.size_bytes >= PARALLEL_BYTES else 1
    starts: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    digests: list[bytes] = []
    newlines = 0
    ends_open = False
    chunks = range(0, facts.size_bytes, _CHUNK_BYTES)
    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        for start, chunk in zip(
            chunks,
            _in_order(pool, lambda start: _chunk(path, start, facts, known_as is None), chunks, threads),
            strict=True,
        ):
            # Newline number 16, 32, ... (counted from 1) is followed by the first row of a run.
            starts.append(chunk.newlines[RUN_ROWS - 1 - newlines % RUN_ROWS :: RUN_ROWS] + (start + 1))
            newlines += len(chunk.newlines)
            digests += chunk.digests
            ends_open = chunk.ends_open
    return LinesIndex(
        path=path,
        format=file_format,
        num_rows=newlines + ends_open,
        size_bytes=facts.size_bytes,
        offsets=np.concatenate(starts),
        blocks=_as_blocks(digests),
        known_as=known_as,
    )


@dataclass(frozen=True)
class _Chunk:
    newlines: npt.NDArray[np.int64]
    digests: list[bytes]
    ends_open: bool


def _chunk(path: str, start: int, facts: FileFacts, hashed: bool) -> _Chunk:
    """Part of a file: its newlines (counted from the part's beginning) and the digests of its blocks."""
    size = min(_CHUNK_BYTES, facts.size_bytes - start)
    with open_input(path) as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise changed(path)
    newlines = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
    return _Chunk(newlines, _digests(data) if hashed else [], not data.endswith(b"\n"))


def _digests(data: bytes) -> list[bytes]:
    view = memoryview(data)
    return [
        hashlib.sha256(view[start : start + _BLOCK_BYTES]).digest()[:_DIGEST_BYTES]
        for start in range(0, len(data), _BLOCK_BYTES)
    ]


def _as_blocks(digests: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)


def _in_order(
    pool: Executor | None, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], ahead: int
) -> Iterator[ResultT]:
    """The results in the order of the items, worked out at most `ahead` items in advance."""
    if pool is None:
        yield from map(function, items)
        return
    pending: deque[Future[ResultT]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _scan_csv(path: str, file_format: FileFormat, facts: FileFacts, known_as: str | None) -> LinesIndex:
    delimiter = DELIMITERS[file_format]
    offsets: list[int] = []
    rows = 0
    with open_input(path) as file:
        lines = iter(file.readline, b"")
        position = header_of(lines, delimiter, path).size_bytes
        for size, _ in csv_rows(lines, delimiter):
            if rows % RUN_ROWS == 0:
                offsets.append(position)
            rows += 1
            position += size
    digests: list[bytes] = []
    if known_as is None:
        for start in range(0, facts.size_bytes, _CHUNK_BYTES):
            digests += _chunk(path, start, facts, hashed=True).digests
    if position != facts.size_bytes:
        raise changed(path)
    return LinesIndex(
        path=path,
        format=file_format,
        num_rows=rows,
        size_bytes=position,
        offsets=np.array(offsets, dtype=np.int64),
        blocks=_as_blocks(digests),
        known_as=known_as,
    )


# -- reading --------------------------------------------------------------------------------------


def read_lines(path: str, file_format: FileFormat, span: Span) -> list[Any]:
    """The rows of a span, or RowError where one cannot be read. Raises DataError or OSError."""
    with open_input(path) as file:
        if file_format in DELIMITERS:
            rows = _read_csv(file, path, file_format, span)
        else:
            lines = _bytes_of(file, path, span).split(b"\n")
            if not lines[-1]:
                lines.pop()
            parse = _parse_line if file_format == "jsonl" else _text_row
            rows = [parse(line) for line in lines] if len(lines) == span.num_rows else []
    if len(rows) != span.num_rows:
        raise changed(path)
    return rows


def _bytes_of(file: BinaryIO, path: str, span: Span) -> bytes:
    file.seek(span.start)
    data = file.read(span.stop - span.start)
    if len(data) != span.stop - span.start:
        raise changed(path)
    return data


def _read_csv(file: BinaryIO, path: str, file_format: FileFormat, span: Span) -> list[Any]:
    delimiter = DELIMITERS[file_format]
    names = header_of(iter(file.readline, b""), delimiter, path).names
    return parse_csv(_bytes_of(file, path, span), delimiter, names)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return RowError("invalid JSON", str(error)) if line.strip() else RowError(BLANK_LINE)


def _text_row(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig").removesuffix("\r")
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", str(error))
    return {"text": text} if text.strip() else RowError(BLANK_LINE)
