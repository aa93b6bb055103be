"""Row ranges to windows: which rows are prepared together. Pure arithmetic on row numbers."""

from collections.abc import Sequence

Ranges = list[tuple[int, int]]
"""Ascending, disjoint [first, last) rows of a file."""

Block = list[tuple[int, int, int]]
"""The rows of one window: (file number, first row, last row)."""


def count_rows(block: Block) -> int:
    """Rows of a block."""
    return sum(stop - start for _, start, stop in block)


def without(whole: Ranges, holes: Ranges) -> Ranges:
    """Rows of `whole` (one range, or none) outside `holes`."""
    result = []
    for start, stop in whole:
        for first, last in holes:
            if start < first:
                result.append((start, first))
            start = last
        if start < stop:
            result.append((start, stop))
    return result


def train_blocks(kept: Sequence[Ranges], size: int) -> list[Block]:
    """Blocks of `size` rows, aligned in each file; files of less than half of that share one.

    Aligned to the file, so that the windows of one file do not depend on the others.
    """
    blocks: list[Block] = []
    small: Block = []
    for number, ranges in enumerate(kept):
        parts = _aligned(number, ranges, size)
        if len(parts) > 1 and count_rows(parts[-1]) < size // 2:
            tail = parts.pop()
            parts[-1] = parts[-1] + tail
        if len(parts) == 1 and count_rows(parts[0]) < size // 2:
            small += parts.pop()
            if count_rows(small) >= size:
                blocks.append(small)
                small = []
        blocks += parts
    return [*blocks, small] if small else blocks


def _aligned(number: int, ranges: Ranges, size: int) -> list[Block]:
    """Cut at multiples of `size`; one part for each."""
    parts: dict[int, Block] = {}
    for start, stop in ranges:
        while start < stop:
            block = start // size
            end = min(stop, (block + 1) * size)
            parts.setdefault(block, []).append((number, start, end))
            start = end
    return list(parts.values())


def eval_blocks(held_out: Sequence[Ranges], size: int) -> list[Block]:
    """Held-out rows of all files in order, `size` at a time."""
    blocks: list[Block] = [[]]
    room = size
    for number, ranges in enumerate(held_out):
        for start, stop in ranges:
            while start < stop:
                end = min(stop, start + room)
                blocks[-1].append((number, start, end))
                room -= end - start
                start = end
                if room == 0:
                    blocks.append([])
                    room = size
    return [block for block in blocks if block]
