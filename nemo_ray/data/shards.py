"""The shard file: the packs of one window, as a memory-mapped Arrow file, with its statistics in the schema.

One row a pack: input_ids (unpadded), targets (0 or 1 for each id), lengths of its documents, and their row
numbers in the window. Neither source nor order nor seed are in it, so that every run that has the window
can use it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_ray.data.encode import Sample
from nemo_ray.data.histograms import Histograms
from nemo_ray.data.packing import Int32, Int64, Pack, build_pack
from nemo_ray.errors import DataError
from nemo_ray.storage import publish_bytes

_STATS_KEY = b"nemo_ray"
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.uint8())),
        ("lengths", pa.list_(pa.int32())),
        ("sample_rows", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class ShardStats:
    """What became of a window's rows: each was rejected, or became documents, kept or dropped.

    Most formats make one document of a row, some several (see docs/formats.md); only then is it more than
    rows = documents + dropped + rejected.
    """

    rows: int
    documents: int
    packs: int
    tokens: int
    targets: int
    dropped: int
    """Documents longer than sequence_len, or with nothing to train left after the cut."""
    truncated: int
    """Documents cut to sequence_len."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    rejected_rows: tuple[tuple[int, str, str], ...] = ()
    """The first of them: (row in the window, reason, detail)."""
    histograms: Histograms = field(default_factory=dict)
    """Of lengths, packs and trained shares: see histograms.py."""

    @property
    def num_rejected(self) -> int:
        """Rows rejected for any reason."""
        return sum(self.rejected.values())


def write_shard(
    path: Path,
    samples: Sequence[Sample],
    rows: Sequence[int],
    packs: Sequence[Sequence[int]],
    stats: ShardStats,
) -> None:
    """Publish a shard. `packs` list indices into `samples`; `rows` are the samples' rows in the window."""
    order = [index for group in packs for index in group]
    lengths = np.array([len(samples[index].ids) for index in order], dtype=np.int32)
    documents = _offsets([len(group) for group in packs])
    tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    if order and tokens[-1] >= 2**31:
        raise DataError(
            f"a window of {tokens[-1]} tokens is too large for a shard; use a smaller sequence_len"
        )
    ids = np.concatenate([samples[index].ids for index in order]) if order else np.zeros(0, np.int32)
    targets = np.concatenate([samples[index].targets for index in order]) if order else np.zeros(0, np.uint8)
    sample_rows = np.array([rows[index] for index in order], dtype=np.int32)
    columns = [
        _lists(tokens, ids),
        _lists(tokens, targets),
        _lists(documents, lengths),
        _lists(documents, sample_rows),
    ]
    schema = _SCHEMA.with_metadata({_STATS_KEY: json.dumps(asdict(stats)).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    publish_bytes(path, sink.getvalue().to_pybytes())


def _offsets(sizes: Sequence[int]) -> Int64:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))]).astype(np.int64)


def _lists(offsets: Int64, values: npt.NDArray[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def read_stats(path: Path) -> ShardStats:
    """The statistics alone: nothing else of the file is read. Raises FileNotFoundError or DataError."""
    return _stats(path, _open(path).schema)


def _open(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"shard {path} is damaged ({error}); delete it, and it is prepared again") from None


def _stats(path: Path, schema: pa.Schema) -> ShardStats:
    try:
        value = json.loads(schema.metadata[_STATS_KEY])
        rejected_rows = tuple(
            (int(row), reason, detail) for row, reason, detail in value.pop("rejected_rows")
        )
        return ShardStats(**value, rejected_rows=rejected_rows)
    except (TypeError, KeyError, ValueError):
        raise DataError(f"shard {path} is damaged; delete it, and it is prepared again") from None


class Shard:
    """An open shard; arrays are views of the mapped file, read when touched."""

    def __init__(self, path: Path) -> None:
        reader = _open(path)
        self.stats = _stats(path, reader.schema)
        batch = reader.get_batch(0)
        self._ids, self._tokens = _column(batch, 0)
        self._targets, _ = _column(batch, 1)
        self._lengths, self._documents = _column(batch, 2)
        self._rows, _ = _column(batch, 3)

    @property
    def num_packs(self) -> int:
        """Packs in the shard; may be 0."""
        return self.stats.packs

    def rows(self, index: int) -> Int32:
        """(num_docs,) row numbers in the window of one pack's documents."""
        return self._rows[self._documents[index] : self._documents[index + 1]]

    def pack(self, index: int, sample_rows: Int64, source: int, sequence_len: int, pad_id: int) -> Pack:
        """One pack, padded; `sample_rows` are its documents' rows in the source."""
        start, stop = self._tokens[index], self._tokens[index + 1]
        lengths = self._lengths[self._documents[index] : self._documents[index + 1]]
        ids, targets = self._ids[start:stop], self._targets[start:stop]
        return build_pack(ids, targets, lengths, sample_rows, source, sequence_len, pad_id)


def _column(batch: pa.RecordBatch, index: int) -> tuple[npt.NDArray[Any], Int32]:
    """(values, offsets) of a list column, without a copy."""
    column = batch.column(index)
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)
