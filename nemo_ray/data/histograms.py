"""Histograms of a shard's documents and packs: a few tens of integers that add up over shards."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Counts = list[int]
Histograms = dict[str, Counts]
"""Name -> counts; `EDGES` tells what the bins are. Trailing zeros are left out."""

_LARGEST_OCTAVE = 30


def _log_edges() -> tuple[float, ...]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four bins an octave; each power of 2 is an edge."""
    fine = [(4 + part) << octave for octave in range(_LARGEST_OCTAVE - 2) for part in range(4)]
    return (1.0, 2.0, 3.0, *map(float, fine))


EDGES: Mapping[str, tuple[float, ...]] = {
    "lengths": _log_edges(),
    "pack_documents": _log_edges(),
    "trained_shares": tuple(part / 10 for part in range(10)),
    "pack_fill": (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0),
}
"""Lower edges of the bins. lengths: tokens of each row's sample, before it is dropped or cut; pack_documents:
documents of each pack; trained_shares: part of a document's tokens that is trained; pack_fill: part of a pack
that holds tokens, where the last bin is full packs."""


def count(name: str, values: Sequence[float] | npt.NDArray[np.number]) -> Counts:
    """Values to counts in the bins of `name`."""
    if len(values) == 0:
        return []
    bins = np.searchsorted(EDGES[name], np.asarray(values, dtype=np.float64), side="right") - 1
    counts: Counts = np.bincount(np.maximum(bins, 0)).tolist()
    return counts


def add(total: Histograms, more: Histograms) -> None:
    """Add `more` to `total`, bin by bin."""
    for name, counts in more.items():
        known = total.setdefault(name, [])
        known += [0] * (len(counts) - len(known))
        for index, number in enumerate(counts):
            known[index] += number


def shard_histograms(
    lengths: Sequence[int],
    documents: Sequence[tuple[int, int]],
    packs: Sequence[Sequence[int]],
    sequence_len: int,
) -> Histograms:
    """`lengths`: of all samples as they were; `documents`: (tokens, trained tokens) of those that are kept;
    `packs`: indices into them."""
    sizes = np.array([tokens for tokens, _ in documents], dtype=np.float64)
    trained = np.array([targets for _, targets in documents], dtype=np.float64)
    counts = np.array([len(group) for group in packs], dtype=np.int64)
    order = np.array([index for group in packs for index in group], dtype=np.int64)
    filled = np.add.reduceat(sizes[order], np.cumsum(counts) - counts) if len(packs) else sizes
    return {
        "lengths": count("lengths", lengths),
        "pack_documents": count("pack_documents", counts),
        "trained_shares": count("trained_shares", trained / sizes),
        "pack_fill": count("pack_fill", filled / sequence_len),
    }
