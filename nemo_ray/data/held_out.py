"""Which rows are held out: runs of 16 rows with the smallest hashes of (file name, run number). Pure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo_ray.data.files import RUN_ROWS
from nemo_ray.data.windows import Ranges
from nemo_ray.hashing import hashes

Part = tuple[str, tuple[int, int]]
"""A file's name, and the [first, last) rows of it that are used."""


def _runs(rows: tuple[int, int]) -> tuple[int, int]:
    """The [first, last) runs that hold any of the rows."""
    return rows[0] // RUN_ROWS, -(-rows[1] // RUN_ROWS) if rows[0] < rows[1] else rows[0] // RUN_ROWS


def choose_fraction(parts: Sequence[Part], fraction: float) -> list[Ranges]:
    """Runs whose hash is below `fraction` of its range; at least one run where `fraction` is not 0."""
    if fraction == 0:
        return [[] for _ in parts]
    numbers = [hashes(name.encode(), *_runs(rows)) for name, rows in parts]
    limit = np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    chosen = [np.flatnonzero(values < limit) for values in numbers]
    if not any(len(runs) for runs in chosen):
        return choose_rows(parts, 1, whole_runs=True)
    return [_ranges(runs + _runs(rows)[0], rows) for runs, (_, rows) in zip(chosen, parts, strict=True)]


def choose_rows(parts: Sequence[Part], num_rows: int, whole_runs: bool = False) -> list[Ranges]:
    """The runs with the smallest hashes, up to `num_rows` rows; the last is cut, unless `whole_runs`."""
    numbers = np.concatenate([hashes(name.encode(), *_runs(rows)) for name, rows in parts])
    sizes = [_runs(rows)[1] - _runs(rows)[0] for _, rows in parts]
    owner = np.repeat(np.arange(len(parts)), sizes)
    firsts = np.concatenate([np.arange(*_runs(rows), dtype=np.int64) for _, rows in parts])
    result: list[Ranges] = [[] for _ in parts]
    left = num_rows
    for at in np.argsort(numbers, kind="stable"):
        if left <= 0:
            break
        rows = parts[owner[at]][1]
        start, stop = max(int(firsts[at]) * RUN_ROWS, rows[0]), min(int(firsts[at] + 1) * RUN_ROWS, rows[1])
        stop = stop if whole_runs else min(stop, start + left)
        result[owner[at]].append((start, stop))
        left -= stop - start
    return [_joined(sorted(ranges)) for ranges in result]


def _ranges(runs: npt.NDArray[np.int64], rows: tuple[int, int]) -> Ranges:
    """Rows of ascending runs, cut to `rows`."""
    found = ((int(run) * RUN_ROWS, (int(run) + 1) * RUN_ROWS) for run in runs)
    return _joined([(max(start, rows[0]), min(stop, rows[1])) for start, stop in found])


def _joined(ranges: Ranges) -> Ranges:
    """Adjacent ranges become one."""
    result: Ranges = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result
