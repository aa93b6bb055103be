"""How many tokens a source's rows have, before anything is prepared: some rows from all over it are encoded.

A file may be sorted by length, or put together from parts: its first rows do not speak for the others.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.files import FileIndex, read_spans
from nemo_ray.data.formats import format_of
from nemo_ray.data.formats.fields import check_fields
from nemo_ray.data.manifest import FileInfo
from nemo_ray.data.prepare import encode_rows, fit, row_columns
from nemo_ray.data.tables import TableIndex
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import TokenizerSpec
from nemo_ray.errors import DataError

PROBED_ROWS = 256
_PLACES, _TABLE_PLACES = 16, 8
"""From which these rows come. Of tables it is fewer: each may cost a row group."""

Piece = tuple[int, int, int]
"""(file, first row, number of rows)."""


def probe(
    spec: DatasetSpec,
    key: str,
    data: DataSection,
    tokenizer: TokenizerSpec,
    files: Sequence[FileInfo],
    indexes: Sequence[FileIndex],
    taken: Sequence[tuple[int, int]],
) -> float:
    """Mean tokens of a row: dropped and rejected ones count as 0, cut ones as cut.

    `taken`: the rows [first, last) of each file that the source has. Raises ConfigError, DataError.
    """
    tables = any(isinstance(index, TableIndex) for index in indexes)
    places = spread(taken, _TABLE_PLACES if tables else _PLACES, PROBED_ROWS)
    rows: list[object] = []
    for number, pieces in groupby(places, key=lambda piece: piece[0]):
        spans = [indexes[number].span(number, first, count) for _, first, count in pieces]
        rows += read_spans(files[number].path, files[number].format, spans, row_columns(spec))
    results = encode_rows(rows, spec, tokenizer, data.train_on_inputs)
    rejected = [result for result in results if isinstance(result, RowError)]
    if len(rejected) == len(results):
        _refuse(spec, key, rejected, rows)
    samples = [sample for result in results if not isinstance(result, RowError) for sample in result]
    splits, truncate = format_of(spec).splits, data.excess_length_strategy == "truncate"
    kept = [part for sample in samples for part in fit(sample, data.sequence_len, splits, truncate)]
    return sum(len(part.ids) for part in kept) / len(rows)


def spread(taken: Sequence[tuple[int, int]], num_places: int, num_rows: int) -> list[Piece]:
    """About `num_rows` of the taken rows, from places at even distances, in order; all where there are fewer.

    A place begins where rows can be found at once, at a multiple of its size in its file.
    """
    sizes = np.array([stop - start for start, stop in taken], dtype=np.int64)
    ends = np.cumsum(sizes)
    total, size = int(ends[-1]), num_rows // num_places
    if total <= num_rows:
        return _pieces(taken, ends, 0, total)
    pieces: list[Piece] = []
    done = 0
    for place in range(num_places):
        middle = (2 * place + 1) * total // (2 * num_places)
        file = int(np.searchsorted(ends, middle, side="right"))
        before = int(ends[file] - sizes[file])
        row = taken[file][0] + middle - before
        first = max(done, before, middle - row % size)
        done = min(first + size, total)
        pieces += _pieces(taken, ends, first, done)
    return pieces


def _pieces(taken: Sequence[tuple[int, int]], ends: np.ndarray, first: int, last: int) -> list[Piece]:
    """The taken rows number [first, last), file by file."""
    pieces = []
    while first < last:
        file = int(np.searchsorted(ends, first, side="right"))
        start, stop = taken[file]
        count = min(last, int(ends[file])) - first
        pieces.append((file, stop - (int(ends[file]) - first), count))
        first += count
    return pieces


def _refuse(spec: DatasetSpec, key: str, rejected: list[RowError], rows: list[object]) -> None:
    """Every probed row was rejected: say why, as an error of the key where a field is not there."""
    first = rejected[0]
    check_fields(spec, key, rejected, rows[0])
    detail = f" ({first.detail})" if first.detail else ""
    raise DataError(
        f"{key}: none of {len(rejected)} rows from all over {spec.path} can be used: {first.reason}{detail}"
    )
