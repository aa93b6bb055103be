"""How many packs each window has, in one file a plan: half a million shards need not be asked for it.

The preparing driver rewrites the file now and then, whole, so that it has what was prepared until then. Its
name holds the plan's fingerprint, a digest of all windows' keys, and a window's key that of all that shapes
its shard: so no other count can be meant.

    packs of each of plan.windows, then of plan.eval_windows (int32, -1: not known) | XXH3 of these
"""

import contextlib
import time

import numpy as np
import xxhash

from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.packing import Int32
from nemo_ray.data.window_list import Window
from nemo_ray.storage import join, publish_bytes, read_bytes

_UNKNOWN = -1
_EVERY_S = 30.0
"""Between two writes, and between two looks of one reader for what it lacks."""
_CHECKSUM_BYTES = 8


def counts_path(plan: DataPlan) -> str:
    """Path or URL of the plan's counts."""
    return join(plan.directory, f"packs-{plan.fingerprint}.bin")


def read_counts(plan: DataPlan) -> Int32:
    """(windows and then eval_windows,) packs of each, -1 where it is not known. Raises OSError."""
    size = len(plan.windows) + len(plan.eval_windows)
    nothing = np.full(size, _UNKNOWN, dtype="<i4")
    try:
        data = read_bytes(counts_path(plan))
    except FileNotFoundError:
        return nothing
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    whole = len(body) == nothing.nbytes and xxhash.xxh3_64_digest(body) == checksum
    return np.frombuffer(body, dtype="<i4") if whole else nothing  # damaged: the shards are asked


class KnownCounts:
    """A reader's: read when it is first asked, and again where it lacks a window."""

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self._counts = np.zeros(0, dtype="<i4")
        self._read_s = -_EVERY_S

    def of(self, index: int) -> int | None:
        """Packs of plan.windows[index], or, from len(plan.windows) on, of an evaluation window."""
        known = index < len(self._counts) and self._counts[index] != _UNKNOWN
        if not known and time.monotonic() >= self._read_s + _EVERY_S:
            self._counts, self._read_s = read_counts(self._plan), time.monotonic()
            known = self._counts[index] != _UNKNOWN
        return int(self._counts[index]) if known else None


class CountsWriter:
    """The driver's."""

    def __init__(self, plan: DataPlan) -> None:
        self._path = counts_path(plan)
        keys = np.concatenate([plan.windows.keys, plan.eval_windows.keys])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._counts = np.full(len(self._keys), _UNKNOWN, dtype="<i4")
        self._written = self._counts.tobytes()
        self._written_s = time.monotonic()

    def add(self, window: Window, packs: int) -> None:
        """Note a window's packs; windows of equal keys share a shard."""
        key = np.bytes_(window.key.encode())
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            self._counts[self._order[at]] = packs
            at += 1

    def write_sometimes(self) -> None:
        """Write, if the last time is a while ago."""
        if time.monotonic() >= self._written_s + _EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what is new. Where nothing can be written, readers ask the shards: slower, no less right."""
        body = self._counts.tobytes()
        if body != self._written:
            with contextlib.suppress(OSError):
                publish_bytes(self._path, body + xxhash.xxh3_64_digest(body))
            self._written, self._written_s = body, time.monotonic()
