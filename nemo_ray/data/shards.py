"""The shard file: the packs of one window, as a memory-mapped Arrow file, then its statistics and checksums.

One row a pack: input_ids (unpadded), targets (0 or 1 for each id), lengths of its documents, and their row
numbers in the window. Neither source nor order nor seed are in it, so that every run that has the window
can use it.

    Arrow file | statistics, JSON | their size and XXH3 | XXH3 of all that comes before | "NEMOSHRD"

A shard is verified when it is opened, before Arrow sees it, whose readers trust their input. That takes 1 ms
for 2 M tokens in memory; reading their packs takes 20.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from nemo_ray.data.encode import Sample
from nemo_ray.data.histograms import Histograms
from nemo_ray.data.packing import Int32, Int64, Pack, build_pack
from nemo_ray.errors import DataError
from nemo_ray.failures import one_line
from nemo_ray.storage import open_input, publish_bytes

_STATS_END = struct.Struct("<QQ")
_END = struct.Struct("<16s8s")
_MAGIC = b"NEMOSHRD"
_TAIL_BYTES = 64 << 10
"""Read for the statistics: most often all of them, in one request."""

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.uint8())),
        ("lengths", pa.list_(pa.int32())),
        ("sample_rows", pa.list_(pa.int32())),
    ]
)


Data = bytes | memoryview


class DamagedShardError(DataError):
    """A shard's bytes are not those that were written."""

    @classmethod
    def of(cls, name: str, why: object) -> "DamagedShardError":
        """The error for the shard of this path or URL."""
        return cls(f"shard {name} is damaged ({why}); start again, and it is prepared again")


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
    path: str,
    samples: Sequence[Sample],
    rows: Sequence[int],
    packs: Sequence[Sequence[int]],
    stats: ShardStats,
) -> None:
    """Publish a shard at a path or URL.

    `packs` list indices into `samples`; `rows` are the samples' rows in the window.
    """
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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    text = json.dumps(asdict(stats)).encode()
    data = sink.getvalue().to_pybytes() + text
    data += _STATS_END.pack(len(text), xxhash.xxh3_64_intdigest(text))
    publish_bytes(path, data + _END.pack(xxhash.xxh3_128_digest(data), _MAGIC))


def _offsets(sizes: Sequence[int]) -> Int64:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))]).astype(np.int64)


def _lists(offsets: Int64, values: npt.NDArray[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def read_stats(path: str) -> ShardStats:
    """The statistics alone, of a path or URL: nothing else is read. Raises FileNotFoundError or DataError."""
    size = _TAIL_BYTES
    while True:
        with open_input(path) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(-min(size, length), os.SEEK_END)
            tail = file.read()
        needed = _stats_bytes(tail, path) + _STATS_END.size + _END.size
        if needed <= len(tail):
            return _stats(tail, path)
        if needed > length:
            raise DamagedShardError.of(path, "it is too short")
        size = needed


def _stats_bytes(data: Data, name: str) -> int:
    """How long the statistics are, from the end of a shard."""
    end = len(data) - _END.size
    if end < _STATS_END.size or bytes(data[-len(_MAGIC) :]) != _MAGIC:
        raise DamagedShardError.of(name, "it has no end")
    size: int = _STATS_END.unpack(data[end - _STATS_END.size : end])[0]
    return size


def _stats(data: Data, name: str) -> ShardStats:
    """From at least the statistics and what follows them."""
    size = _stats_bytes(data, name)
    stop = len(data) - _END.size - _STATS_END.size
    text = bytes(data[stop - size : stop])
    if xxhash.xxh3_64_intdigest(text) != _STATS_END.unpack(data[stop : stop + _STATS_END.size])[1]:
        raise DamagedShardError.of(name, "its statistics do not have their checksum")
    value = json.loads(text)
    rejected_rows = tuple((int(row), reason, detail) for row, reason, detail in value.pop("rejected_rows"))
    return ShardStats(**value, rejected_rows=rejected_rows)


class Shard:
    """An open shard, verified; arrays are views of the mapped file.

    `name`: what messages call it, where it is a copy of something else. Raises FileNotFoundError or
    DamagedShardError.
    """

    def __init__(self, path: str, name: str | None = None) -> None:
        name = name or path
        mapped = _map(path, name)
        view = memoryview(mapped)
        size = _stats_bytes(view, name)
        checksum, _ = _END.unpack(view[-_END.size :])
        if xxhash.xxh3_128_digest(view[: -_END.size]) != checksum:
            raise DamagedShardError.of(name, "its content does not have its checksum")
        self.stats = _stats(view, name)
        arrow = mapped.slice(0, len(view) - _END.size - _STATS_END.size - size)
        batch = pa.ipc.open_file(pa.BufferReader(arrow)).get_batch(0)
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


def _map(path: str, name: str) -> pa.Buffer:
    """The file's bytes, read when they are touched."""
    try:
        with pa.memory_map(path) as file:
            return file.read_buffer()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedShardError.of(name, one_line(error)) from None


def _column(batch: pa.RecordBatch, index: int) -> tuple[npt.NDArray[Any], Int32]:
    """(values, offsets) of a list column, without a copy."""
    column = batch.column(index)
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)
