"""Row ranges to windows: which rows are prepared together. Pure arithmetic on row numbers."""

import hashlib
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


def blocks_of(names: Sequence[str], rows: Sequence[Ranges], size: int, *, aligned: bool) -> list[Block]:
    """Blocks of about `size` rows, so that those of one file hardly depend on the others.

    A file is cut by itself: `aligned`, at the multiples of `size` among its row numbers; else after every
    `size` of its given rows. Files of less than half of that share blocks (`_Sharing`).
    """
    blocks: list[Block] = []
    sharing = _Sharing(size)
    for number, (name, ranges) in enumerate(zip(names, rows, strict=True)):
        parts = _aligned(number, ranges, size) if aligned else _counted(number, ranges, size)
        if len(parts) > 1 and count_rows(parts[-1]) < size // 2:
            tail = parts.pop()
            parts[-1] = parts[-1] + tail
        if len(parts) == 1 and count_rows(parts[0]) < size // 2:
            sharing.add(name, parts.pop())
        blocks += sharing.taken() + parts
    return blocks + sharing.rest()


class _Sharing:
    """Blocks of small files, cut where a hash of the last file's name says so, not where a sum of rows does:
    a file more or less changes the block that it is in, and the blocks beyond the next such cut stay.

    The hash cuts a block of half a `size` or more, on average after another half; twice a `size` is the most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: Block = []
        self._done: list[Block] = []

    def add(self, name: str, part: Block) -> None:
        """The next file's rows."""
        rows = count_rows(self._open) + count_rows(part)
        self._open = self._open + part
        share = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2.0**64
        if rows * 2 >= self._size and (share * self._size < 2 * count_rows(part) or rows >= 2 * self._size):
            self._done.append(self._open)
            self._open = []

    def taken(self) -> list[Block]:
        """The blocks that are complete, once."""
        done, self._done = self._done, []
        return done

    def rest(self) -> list[Block]:
        """The last block, if any row is left."""
        return [self._open] if self._open else []


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


def _counted(number: int, ranges: Ranges, size: int) -> list[Block]:
    """Cut after every `size` rows."""
    parts: list[Block] = [[]]
    room = size
    for start, stop in ranges:
        while start < stop:
            end = min(stop, start + room)
            parts[-1].append((number, start, end))
            room -= end - start
            start = end
            if room == 0:
                parts.append([])
                room = size
    return [part for part in parts if part]
