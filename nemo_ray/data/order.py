"""The one global order of packs: a pure function of window list, shard contents, seed and epoch.

Never of what happens to be prepared, of the number of workers, or of where steps begin. Reading shards and
waiting for them is reader.py's, how often a source is read mixing.py's.

A source's rows form an endless stream, one round of its shuffled windows after the other. An epoch is a
stretch of each stream; a few windows of every stretch are open at a time, and their packs are drawn in random
order. The next pack comes from the source that has given the smallest part of its stretch: so every step sees
the whole mix, and all sources end together.

    rounds      |---- round 0 ----|---- round 1 ----|---- ...      windows in another order each
    epochs      [== epoch 0 ==)[== epoch 1 ==)[== ...              here with 0.8 rounds an epoch
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.mixing import passes
from nemo_ray.data.packing import Int64
from nemo_ray.hashing import Choices, shuffled

OPEN_WINDOWS = 8


class Position(NamedTuple):
    """Pack number `pack` of the shard of `plan.windows[window]`."""

    window: int
    pack: int


class Visit(NamedTuple):
    """Reading the rows [first, last) of a window, of which a stretch may take a part only."""

    start: int
    """Place in the source's stream; names the visit."""
    window: int
    round: int
    first: int
    last: int
    num_rows: int
    """Of the whole window."""

    def packs(self, num_packs: int) -> tuple[int, int]:
        """[first, last) of the window's packs in the round's order. Parts of one window share none."""
        return self.first * num_packs // self.num_rows, self.last * num_packs // self.num_rows


class Stream:
    """One source's rows, round after round."""

    def __init__(self, plan: DataPlan, source: int, seed: int, times: float) -> None:
        """`times`: rounds in an epoch."""
        self.source = source
        self._windows: Int64 = np.flatnonzero(plan.windows.sources == source)
        self._sizes = plan.windows.num_rows[self._windows]
        self.rows = int(self._sizes.sum())
        self._seed, self._times = seed, times
        self._round = -1
        self._order: Int64 = np.zeros(0, dtype=np.int64)
        self._ends: Int64 = self._order

    def stretch(self, epoch: int) -> tuple[int, int]:
        """[first, last) rows of the stream that an epoch reads."""
        return round(epoch * self._times * self.rows), round((epoch + 1) * self._times * self.rows)

    def visit(self, start: int, limit: int) -> Visit:
        """The visit that begins at row `start` of the stream and does not pass `limit`."""
        number, offset = divmod(start, self.rows)
        order, ends = self.round(number)
        at = int(np.searchsorted(ends, offset, side="right"))
        size = int(ends[at]) - (int(ends[at - 1]) if at else 0)
        first = offset - (int(ends[at]) - size)
        return Visit(start, int(order[at]), number, first, min(size, first + limit - start), size)

    def round(self, number: int) -> tuple[Int64, Int64]:
        """(windows,) indices of plan.windows in a round's order, and the row at which each ends."""
        if number != self._round:
            self._round = number
            order = shuffled(len(self._windows), "windows", self._seed, number, self.source)
            self._order, self._ends = self._windows[order], np.cumsum(self._sizes[order])
        return self._order, self._ends


def streams(plan: DataPlan, seed: int) -> list[Stream]:
    """The streams of all sources that are trained on."""
    found = (Stream(plan, source, seed, times) for source, times in enumerate(passes(plan.sources)) if times)
    return [stream for stream in found if stream.rows]


def _slots(plan: DataPlan, parts: list[Stream]) -> list[int]:
    """Windows of each stream that are open at a time: by tokens, and one at least."""
    tokens = [max(stream.stretch(0)[1], 1) * _tokens_per_row(plan, stream) for stream in parts]
    return [max(1, round(OPEN_WINDOWS * part / sum(tokens))) for part in tokens]


def _tokens_per_row(plan: DataPlan, stream: Stream) -> float:
    """Estimated, never 0."""
    return max(plan.sources[stream.source].tokens_per_row, 1.0)


def window_order(plan: DataPlan, seed: int) -> list[int]:
    """All indices of plan.windows in about the order in which training opens them, to prepare them in."""
    parts = streams(plan, seed)
    windows, keys, places = [], [], []
    for stream, num_open in zip(parts, _slots(plan, parts), strict=True):
        order, ends = stream.round(0)
        first, last = stream.stretch(0)
        # Window k is opened when the one num_open before it is closed, about where the next of those began.
        opened = np.zeros(len(order))
        opened[num_open:] = ends[: max(len(order) - num_open, 0)] / max(last - first, 1)
        windows.append(order)
        keys.append(opened)
        places.append(np.arange(len(order)))
    if not windows:
        return []
    found: list[int] = np.concatenate(windows)[
        np.lexsort((np.concatenate(places), np.concatenate(keys)))
    ].tolist()
    return found


@dataclass(slots=True)
class _Open:
    """A visit under way: `packs`, `drawn` are of the visit; packs is -1 until it is first asked for."""

    visit: Visit
    packs: int = -1
    drawn: int = 0

    def rows_left(self) -> float:
        """Rows that the packs not drawn yet stand for: the visit's rows count evenly over its packs."""
        rows = self.visit.last - self.visit.first
        return rows * (self.packs - self.drawn) / self.packs if self.packs > 0 else rows


class _Stretch:
    """What is left of a stream's part of an epoch."""

    def __init__(self, stream: Stream, epoch: int, num_open: int, rows_per_pack: float) -> None:
        self.stream = stream
        self._first, self._last = stream.stretch(epoch)
        self._num_open = num_open
        self._estimated_rows_per_pack = rows_per_pack
        self.place = self._first
        self.open: list[_Open] = []
        self.fill()

    def fill(self) -> None:
        """Open windows until there are as many as there should be."""
        while len(self.open) < self._num_open and self.place < self._last:
            self._refill(len(self.open))

    def restore(self, place: int, under_way: list[list[int]]) -> None:
        """Go on where `state` was taken."""
        self.place = place
        self.open = [
            _Open(self.stream.visit(start, self._last), packs, drawn) for start, packs, drawn in under_way
        ]

    def state(self) -> list[Any]:
        """Integers, from which `restore` goes on."""
        return [self.place, [[one.visit.start, one.packs, one.drawn] for one in self.open]]

    def pick(self, number: int, num_packs: Callable[[int], int]) -> int | None:
        """The index in `open` that a random number falls on; visits without packs are closed on the way."""
        while self.open:
            slot = number % len(self.open)
            one = self.open[slot]
            if one.packs < 0:
                first, last = one.visit.packs(num_packs(one.visit.window))
                one.packs = last - first
            if one.packs:
                return slot
            self._close(slot)
        return None

    def draw(self, slot: int) -> tuple[Visit, int]:
        """The visit, and the number of its pack that is drawn."""
        one = self.open[slot]
        one.drawn += 1
        if one.drawn == one.packs:
            self._close(slot)
        return one.visit, one.drawn - 1

    def rows_drawn(self) -> float:
        """Rows that the drawn packs stand for."""
        return self.place - self._first - sum([one.rows_left() for one in self.open])

    def progress(self) -> float:
        """The part of the stretch after half of the next pack, about: the smallest is drawn from."""
        return (self.rows_drawn() + self._rows_per_pack() / 2) / (self._last - self._first)

    def _rows_per_pack(self) -> float:
        for one in self.open:
            if one.packs > 0:
                return (one.visit.last - one.visit.first) / one.packs
        return self._estimated_rows_per_pack

    def _close(self, slot: int) -> None:
        del self.open[slot]
        if self.place < self._last:
            self._refill(slot)

    def _refill(self, slot: int) -> None:
        visit = self.stream.visit(self.place, self._last)
        self.open.insert(slot, _Open(visit))
        self.place += visit.last - visit.first


class EpochOrder:
    """Draws the packs of one epoch.

    `num_packs(window)` is asked when the first pack of a visit is drawn, and may wait for the shard.
    """

    def __init__(self, plan: DataPlan, seed: int, epoch: int, num_packs: Callable[[int], int]) -> None:
        self._plan, self._seed, self._epoch, self._num_packs = plan, seed, epoch, num_packs
        self._choices = Choices("draws", seed, epoch)
        parts = streams(plan, seed)
        self._stretches = [
            _Stretch(stream, epoch, num_open, plan.sequence_len / _tokens_per_row(plan, stream))
            for stream, num_open in zip(parts, _slots(plan, parts), strict=True)
            if stream.stretch(epoch)[0] < stream.stretch(epoch)[1]
        ]
        self._num_rows = sum(stream.stretch(epoch)[1] - stream.stretch(epoch)[0] for stream in parts)
        self._next: tuple[int, int] | None = None
        self._shuffled: dict[tuple[int, int], list[int]] = {}
        self.drawn = 0
        self._queue()

    def draw(self) -> Position | None:
        """The next pack, or None at the end of the epoch."""
        picked = self._pick()
        if picked is None:
            return None
        self._next = None
        number, slot = picked
        stretch = self._stretches[number]
        visit, draw = stretch.draw(slot)
        heapq.heapreplace(self._heap, (stretch.progress(), number))
        self.drawn += 1
        return Position(visit.window, self._pack(visit, draw))

    def exhausted(self) -> bool:
        """Is nothing left? Looks at further windows only where those at hand do not tell."""
        if any(one.packs > 0 for stretch in self._stretches for one in stretch.open):
            return False
        return self._pick() is None

    def progress(self) -> float:
        """Rows that the drawn packs stand for, as a part of the epoch's."""
        return sum(stretch.rows_drawn() for stretch in self._stretches) / max(self._num_rows, 1)

    def state(self) -> dict[str, Any]:
        """JSON-ready integers, a few dozens; with them `restore` goes on at once, wherever the epoch is."""
        return {"drawn": self.drawn, "stretches": [stretch.state() for stretch in self._stretches]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on an order of the same plan, seed and epoch."""
        self.drawn = state["drawn"]
        for stretch, (place, under_way) in zip(self._stretches, state["stretches"], strict=True):
            stretch.restore(place, under_way)
        self._queue()

    def _queue(self) -> None:
        self._next = None
        self._heap = [(stretch.progress(), number) for number, stretch in enumerate(self._stretches)]
        heapq.heapify(self._heap)

    def _pick(self) -> tuple[int, int] | None:
        """The stretch and the open visit of the next draw."""
        while self._next is None and self._heap:
            number = self._heap[0][1]
            slot = self._stretches[number].pick(self._choices[self.drawn], self._num_packs)
            if slot is None:
                heapq.heappop(self._heap)
            else:
                self._next = number, slot
        return self._next

    def _pack(self, visit: Visit, draw: int) -> int:
        """Which pack of its shard a draw is; a visit's order is forgotten with its last pack."""
        name = (visit.window, visit.start)
        packs = self._shuffled.get(name)
        if packs is None:
            num_packs = self._num_packs(visit.window)
            first, last = visit.packs(num_packs)
            key = self._plan.windows[visit.window].key
            packs = shuffled(num_packs, "packs", self._seed, visit.round, visit.window, key)[
                first:last
            ].tolist()
            self._shuffled[name] = packs
        if draw == len(packs) - 1:
            del self._shuffled[name]
        return packs[draw]
