"""Packing, pure: which documents share a pack, and the arrays of one pack.

Owns `pack` (lengths -> groups) and `Pack`. Knows neither files nor tokenizers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that is no target."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """`sequence_len` (T) tokens of whole documents, then padding that is a masked sequence of its own.

    `labels` are not shifted; the first token of a document is never a target. `lengths` includes the padded
    tail, so it sums to T; `sample_rows` and `sources` have one entry a document.
    """

    input_ids: Int32  # (T,)
    labels: Int32  # (T,)
    position_ids: Int32  # (T,) restart at 0 in every sequence
    seq_idx: Int32  # (T,) number of the sequence
    lengths: Int32  # (num_sequences,)
    sample_rows: Int64  # (num_docs,) row number in the source
    sources: Int32  # (num_docs,)
    num_tokens: int  # without padding
    num_targets: int  # labels != IGNORED: each has a predecessor in its document


def pack(lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Group documents so that each group's lengths sum to at most `capacity`; few groups, deterministic.

    Every bin is filled with the longest document that still fits, until none does (the bins of first-fit
    decreasing). Documents of one length go in the order given. Lengths must be 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    assert sizes.min() >= 1 and sizes.max() <= capacity, "every document must fit in a pack"
    order = np.argsort(sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    starts = (
        np.cumsum(counts) - counts
    ).tolist()  # documents of length n: order[starts[n]:starts[n]+remaining[n]]
    remaining = counts.tolist()
    present = np.where(counts > 0, np.arange(capacity + 1), 0)
    # A forest: the root above n is the longest length <= n that is left (0: none is). Lengths only vanish.
    parents = np.maximum.accumulate(present).tolist()
    documents = order.tolist()
    groups: list[list[int]] = []
    left = int(sizes.size)
    while left:
        group: list[int] = []
        room = capacity
        while room:
            size = parents[room]
            if parents[size] != size:
                size = _root(parents, room)
            if size == 0:
                break
            first = starts[size]
            take = min(remaining[size], room // size)
            group += documents[first : first + take]
            starts[size] = first + take
            remaining[size] -= take
            if not remaining[size]:
                parents[size] = parents[size - 1]
            room -= take * size
        left -= len(group)
        groups.append(group)
    return groups


def _root(parents: list[int], node: int) -> int:
    """The root above a node; the path to it is halved on the way."""
    while parents[node] != node:
        parents[node] = node = parents[parents[node]]
    return node


def build_pack(
    ids: Int32,
    targets: npt.NDArray[np.uint8],
    lengths: Int32,
    sample_rows: Int64,
    source: int,
    sequence_len: int,
    pad_id: int,
) -> Pack:
    """Pad one packed row of a shard: `ids`, `targets` (num_tokens,), `lengths`, `sample_rows` (num_docs,)."""
    num_tokens = int(ids.shape[0])
    assert num_tokens <= sequence_len and int(lengths.sum()) == num_tokens
    input_ids = np.full(sequence_len, pad_id, dtype=np.int32)
    input_ids[:num_tokens] = ids
    labels = np.full(sequence_len, IGNORED, dtype=np.int32)
    labels[:num_tokens] = np.where(targets != 0, ids, IGNORED)
    tail = sequence_len - num_tokens
    all_lengths = np.append(lengths, np.int32(tail)).astype(np.int32) if tail else lengths.astype(np.int32)
    starts = (np.cumsum(all_lengths) - all_lengths).astype(np.int32)
    labels[starts] = IGNORED
    return Pack(
        input_ids=input_ids,
        labels=labels,
        position_ids=np.arange(sequence_len, dtype=np.int32) - np.repeat(starts, all_lengths),
        seq_idx=np.repeat(np.arange(len(all_lengths), dtype=np.int32), all_lengths),
        lengths=all_lengths,
        sample_rows=sample_rows,
        sources=np.full(len(sample_rows), source, dtype=np.int32),
        num_tokens=num_tokens,
        num_targets=int(np.count_nonzero(labels != IGNORED)),
    )


def filler_pack(sequence_len: int, pad_id: int) -> Pack:
    """A pack without documents: what a rank computes where the epoch ran out."""
    return build_pack(
        np.zeros(0, np.int32),
        np.zeros(0, np.uint8),
        np.zeros(0, np.int32),
        np.zeros(0, np.int64),
        0,
        sequence_len,
        pad_id,
    )
