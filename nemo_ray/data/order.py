"""The one global order of packs: a pure function of window list, shard contents, seed and epoch.

Never of what happens to be prepared, of the number of workers, or of where steps begin. Reading shards,
waiting for them and the cursor are reader.py's.
"""

import hashlib
import heapq
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nemo_ray.data.manifest import DataPlan

OPEN_WINDOWS = 8


class Position(NamedTuple):
    """The `draw`-th pack taken from `plan.windows[window]` in an epoch; see `shuffled_packs`."""

    window: int
    draw: int


def _generator(*parts: object) -> random.Random:
    """A generator seeded by the parts. Only `random()` is used: its sequence is the same in every Python."""
    return random.Random(hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest())


def _shuffled(size: int, generator: random.Random) -> list[int]:
    keys = [generator.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)


def shuffled_packs(plan: DataPlan, window: int, num_packs: int, seed: int, epoch: int) -> list[int]:
    """The order in which the packs of one window are drawn."""
    return _shuffled(num_packs, _generator("packs", seed, epoch, window, plan.windows[window].key))


def window_order(plan: DataPlan, seed: int, epoch: int = 0) -> list[int]:
    """Indices of plan.windows in the order they are opened, which is also the order to prepare them in.

    The windows of each source are shuffled; the next one is taken from the source that has given the fewest
    tokens (estimated ones, and half of the next window) relative to its size. So sources are spread evenly
    over the epoch.
    """
    queues: list[list[int]] = [[] for _ in plan.sources]
    for index, window in enumerate(plan.windows):
        queues[window.source].append(index)
    for source, queue in enumerate(queues):
        queues[source] = [queue[i] for i in _shuffled(len(queue), _generator("windows", seed, epoch, source))]
    tokens = [max(plan.estimated_tokens(window), 1.0) for window in plan.windows]
    sizes = [sum(tokens[index] for index in queue) for queue in queues]
    given = [0.0] * len(queues)
    taken = [0] * len(queues)
    heap = [(tokens[queue[0]] / 2 / sizes[source], source) for source, queue in enumerate(queues) if queue]
    heapq.heapify(heap)
    order = []
    while heap:
        _, source = heapq.heappop(heap)
        queue = queues[source]
        index = queue[taken[source]]
        order.append(index)
        given[source] += tokens[index]
        taken[source] += 1
        if taken[source] < len(queue):
            following = tokens[queue[taken[source]]]
            heapq.heappush(heap, ((given[source] + following / 2) / sizes[source], source))
    return order


@dataclass
class _Open:
    """A window that packs are drawn from; `packs` is None until it is first asked for."""

    index: int
    packs: int | None = None
    taken: int = 0


class EpochOrder:
    """Draws the packs of one epoch: eight windows are open, each draw picks one of them.

    `num_packs(window)` is asked once a window, when its first pack is drawn, and may wait for its shard.
    """

    def __init__(self, plan: DataPlan, seed: int, epoch: int, num_packs: Callable[[int], int]) -> None:
        self._plan = plan
        self._num_packs = num_packs
        self._choice = _generator("draws", seed, epoch)
        self._queue = iter(window_order(plan, seed, epoch))
        self._open: list[_Open] = []
        self._next: int | None = None
        self._closed_rows = 0
        self.drawn = 0
        for _ in range(OPEN_WINDOWS):
            self._refill(len(self._open))

    def draw(self) -> Position | None:
        """The next pack, or None at the end of the epoch."""
        slot = self._pick()
        if slot is None:
            return None
        self._next = None
        window = self._open[slot]
        position = Position(window.index, window.taken)
        window.taken += 1
        self.drawn += 1
        if window.taken == window.packs:
            self._close(slot)
        return position

    def exhausted(self) -> bool:
        """Is nothing left? Looks at further windows only where those at hand do not tell."""
        if any(window.packs is not None and window.taken < window.packs for window in self._open):
            return False
        return self._pick() is None

    def rows_consumed(self) -> float:
        """Rows that the drawn packs stand for: a window's rows count evenly over its packs."""
        drawn = sum(
            self._plan.windows[window.index].num_rows * window.taken / window.packs
            for window in self._open
            if window.packs
        )
        return self._closed_rows + drawn

    def _pick(self) -> int | None:
        """The slot of the next draw; windows without packs are closed on the way."""
        while self._next is None and self._open:
            slot = int(self._choice.random() * len(self._open))
            window = self._open[slot]
            if window.packs is None:
                window.packs = self._num_packs(window.index)
            if window.packs == 0:
                self._close(slot)
            else:
                self._next = slot
        return self._next

    def _close(self, slot: int) -> None:
        self._closed_rows += self._plan.windows[self._open.pop(slot).index].num_rows
        self._refill(slot)

    def _refill(self, slot: int) -> None:
        index = next(self._queue, None)
        if index is not None:
            self._open.insert(slot, _Open(index))
