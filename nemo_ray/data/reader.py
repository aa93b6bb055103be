"""Shards to packs: what each rank reads in each step, and the place that a checkpoint keeps.

Position i of a step goes to rank i % world_size, so what a step trains on does not depend on the number of
workers. A shard that is not there yet is waited for. The order itself is order.py's.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.order import OPEN_WINDOWS, EpochOrder
from nemo_ray.data.pack_counts import KnownCounts, counts_path
from nemo_ray.data.packing import Int64, Pack, filler_pack
from nemo_ray.data.shard_cache import open_shard
from nemo_ray.data.shards import DamagedShardError, Shard, read_stats
from nemo_ray.data.waiting import ShardWait
from nemo_ray.data.window_list import Window
from nemo_ray.errors import DataError
from nemo_ray.object_store import expect_answers
from nemo_ray.storage import remove
from nemo_ray.urls import is_url


@dataclass(frozen=True)
class StepPacks:
    """What one optimizer step reads."""

    packs: tuple[Pack, ...]
    """This rank's: packs_per_rank of them, all-masked where there are no more in the step."""
    drawn: tuple[tuple[str, int], ...]
    """(window's key, pack of its shard) of each pack of the WHOLE step in order, without fillers."""
    cursor: int
    """Global packs consumed after this step, over all epochs; fillers do not count."""
    place: dict[str, Any]
    """What a reader needs to go on after this step, on any number of workers. JSON-ready and small."""
    epoch: float
    """Rows consumed / rows of an epoch."""
    end_of_epoch: bool
    wait_s: float
    """Time this step waited for shards."""


class _Read(NamedTuple):
    """One pack of a step: of a window, its index in the shard."""

    window: Window
    pack: int
    num_packs: int
    """That the order was made with."""


Repair = Callable[[Window], None]
"""Prepares a window again: what a reader does with a damaged shard. See prepare.repairer."""

T = TypeVar("T")


class _Shards:
    """Open shards of a plan, a few at a time."""

    def __init__(self, plan: DataPlan, timeout_s: float, repair: Repair | None) -> None:
        expect_answers(plan.directory)  # the driver has planned it
        self._plan = plan
        self._repair = repair
        self._fetched_s = 0.0
        self._waiting = ShardWait(plan, timeout_s)
        self._counts = KnownCounts(plan)
        self._shards: OrderedDict[tuple[int, str], tuple[Shard, Int64, Int64]] = OrderedDict()

    def num_packs(self, index: int) -> int:
        """Of plan.windows[index], or, from len(plan.windows) on, of an evaluation window.

        From the plan's counts, else from the shard's statistics alone, for which it waits.
        """
        known = self._counts.of(index)
        if known is not None:
            return known
        plan, beyond = self._plan, index - len(self._plan.windows)
        window = plan.windows[index] if beyond < 0 else plan.eval_windows[beyond]
        return self._whole(window, read_stats).packs

    def _whole(self, window: Window, read: Callable[[str], T]) -> T:
        """Wait for the shard and read it; a damaged one is prepared again, once, and read again."""
        path = self._waiting.wait_for(window)
        started = time.monotonic()
        try:
            return read(path)
        except DamagedShardError as error:
            if self._repair is None:
                remove(path)  # or the next start would find it as it is
                raise
            logging.getLogger(__name__).warning("%s", error)
            self._repair(window)
            return read(path)
        finally:
            if is_url(path):
                self._fetched_s += time.monotonic() - started

    def waited_s(self) -> float:
        """Seconds waited since this was last asked, for shards to be written and for an object store."""
        fetched, self._fetched_s = self._fetched_s, 0.0
        return self._waiting.take_waited_s() + fetched

    def read(self, read: _Read) -> Pack:
        """The pack, padded to sequence_len."""
        shard, starts, first_rows = self._open(read.window)
        if shard.num_packs != read.num_packs:
            place = self._plan.shard_path(read.window)
            raise DataError(
                f"{counts_path(self._plan)} says {read.num_packs} packs of {place}, which has "
                f"{shard.num_packs}: it was made again by other versions; delete both and start again"
            )
        rows = shard.rows(read.pack)
        span = np.searchsorted(starts, rows, side="right") - 1
        sample_rows: Int64 = first_rows[span] + (rows - starts[span])
        plan = self._plan
        return shard.pack(read.pack, sample_rows, read.window.source, plan.sequence_len, plan.pad_id)

    def _open(self, window: Window) -> tuple[Shard, Int64, Int64]:
        """The shard; the first row in the window, and in the source, of each of the window's spans."""
        name = (window.source, window.key)  # sources with equal rows share shards, not row numbers
        entry = self._shards.get(name)
        if entry is None:
            spans = window.source_rows(self._plan.sources[window.source])
            sizes = np.array([size for _, size in spans], dtype=np.int64)
            first_rows = np.array([first for first, _ in spans], dtype=np.int64)
            entry = (self._whole(window, open_shard), np.cumsum(sizes) - sizes, first_rows)
            self._shards[name] = entry
            if len(self._shards) > 2 * OPEN_WINDOWS + len(self._plan.sources):
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return entry


class _Ranks:
    """Splits steps over ranks: shared by both readers."""

    def __init__(
        self,
        plan: DataPlan,
        rank: int,
        world_size: int,
        packs_per_step: int,
        packs_per_rank: int | None,
        timeout_s: float,
        repair: Repair | None,
    ) -> None:
        self._packs_per_rank = packs_per_rank or packs_per_step // world_size
        assert 0 <= rank < world_size and 0 < packs_per_step <= self._packs_per_rank * world_size
        self.plan = plan
        self.shards = _Shards(plan, timeout_s, repair)
        self.packs_per_step = packs_per_step
        self._rank, self._world_size = rank, world_size

    def step(
        self, reads: list[_Read], cursor: int, place: dict[str, Any], epoch: float, end_of_epoch: bool
    ) -> StepPacks:
        """Read this rank's packs."""
        packs = [
            self.shards.read(reads[i]) if i < len(reads) else self._filler
            for i in range(self._rank, self._packs_per_rank * self._world_size, self._world_size)
        ]
        drawn = tuple((read.window.key, read.pack) for read in reads)
        return StepPacks(tuple(packs), drawn, cursor, place, epoch, end_of_epoch, self.shards.waited_s())

    @cached_property
    def _filler(self) -> Pack:
        return filler_pack(self.plan.sequence_len, self.plan.pad_id)


class PackReader:
    """The training packs of one rank, from the beginning or from `place` on (StepPacks.place).

    `packs_per_step` is global. `packs_per_rank`: where it does not divide by the workers, how many each gets,
    some of them all-masked; packs_per_step / world_size by default. `num_epochs` may be fractional, or
    math.inf. Reads raise DataError when preparation failed, gave no new shard for `timeout_s`, or left a
    damaged shard and there is no `repair`.
    """

    def __init__(
        self,
        plan: DataPlan,
        *,
        seed: int,
        num_epochs: float,
        rank: int,
        world_size: int,
        packs_per_step: int,
        packs_per_rank: int | None = None,
        place: Mapping[str, Any] | None = None,
        timeout_s: float = 1800.0,
        repair: Repair | None = None,
    ) -> None:
        self._ranks = _Ranks(plan, rank, world_size, packs_per_step, packs_per_rank, timeout_s, repair)
        self._plan = plan
        self._seed = seed
        self._num_epochs = num_epochs
        self._packs_of: dict[int, int] = {}
        self._cursor = 0
        self._begin_epoch(0)
        if place is not None:
            self._cursor = place["cursor"]
            self._begin_epoch(place["epoch"])
            self._order.restore(place["order"])

    def next_step(self) -> StepPacks | None:
        """The next step, or None when all epochs are done. A step never crosses an epoch."""
        if self._order.exhausted():
            if self._order.drawn == 0:
                raise DataError(
                    "datasets: no row became a pack; the data statistics say what was dropped, and why"
                )
            if self._done():
                return None
            self._begin_epoch(self._epoch + 1)
        reads: list[_Read] = []
        while len(reads) < self._ranks.packs_per_step and not self._done():
            position = self._order.draw()
            if position is None:
                break
            window = self._plan.windows[position.window]
            reads.append(_Read(window, position.pack, self._packs_of[position.window]))
        if not reads:
            return None
        self._cursor += len(reads)
        place = {"cursor": self._cursor, "epoch": self._epoch, "order": self._order.state()}
        return self._ranks.step(reads, self._cursor, place, self._progress(), self._order.exhausted())

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = EpochOrder(self._plan, self._seed, epoch, self._num_packs)

    def _progress(self) -> float:
        return self._epoch + (1.0 if self._order.exhausted() else self._order.progress())

    def _done(self) -> bool:
        return self._num_epochs <= self._epoch + 1 and self._progress() >= self._num_epochs

    def _num_packs(self, window: int) -> int:
        if window not in self._packs_of:
            self._packs_of[window] = self._ranks.shards.num_packs(window)
        return self._packs_of[window]


class EvalReader:
    """The held-out packs of one rank, in fixed order. Build one for each evaluation."""

    def __init__(
        self,
        plan: DataPlan,
        *,
        rank: int,
        world_size: int,
        packs_per_step: int,
        timeout_s: float = 1800.0,
        repair: Repair | None = None,
    ) -> None:
        self._ranks = _Ranks(plan, rank, world_size, packs_per_step, None, timeout_s, repair)
        self._plan = plan
        self._cursor = 0
        self._reads = self._all()
        self._following = next(self._reads, None)

    def next_step(self) -> StepPacks | None:
        """The next packs, or None at the end."""
        reads: list[_Read] = []
        while self._following is not None and len(reads) < self._ranks.packs_per_step:
            reads.append(self._following)
            self._following = next(self._reads, None)
        if not reads:
            return None
        self._cursor += len(reads)
        end = self._following is None
        return self._ranks.step(reads, self._cursor, {}, 1.0 if end else 0.0, end)

    def _all(self) -> Iterator[_Read]:
        for index, window in enumerate(self._plan.eval_windows, start=len(self._plan.windows)):
            num_packs = self._ranks.shards.num_packs(index)
            for pack in range(num_packs):
                yield _Read(window, pack, num_packs)
