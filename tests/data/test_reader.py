"""The order: exact, the same for every number of workers, and independent of what is prepared when."""

import json
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_ray.data.encode import Sample
from nemo_ray.data.manifest import DataPlan, FileInfo, SourceInfo
from nemo_ray.data.order import EpochOrder, window_order
from nemo_ray.data.pack_counts import CountsWriter, KnownCounts, counts_path, read_counts
from nemo_ray.data.packing import Pack
from nemo_ray.data.reader import EvalReader, PackReader, StepPacks
from nemo_ray.data.shards import ShardStats, write_shard
from nemo_ray.data.window_list import Span, Window, WindowList
from nemo_ray.errors import DataError
from nemo_ray.storage import publish_json

ROWS = 5
LENGTH = 8


def make_plan(folder: Path, packs: list[list[int]], name: str = "") -> DataPlan:
    """packs[source][window] is the number of packs of a window of 5 rows; packs hold one or two rows."""
    windows = []
    infos = []
    for source, counts in enumerate(packs):
        for number in range(len(counts)):
            span = Span(0, 0, 0, number * ROWS, ROWS)
            windows.append(Window(source, (span,), ROWS, f"{name}s{source}w{number}p{counts[number]}"))
        file = FileInfo(f"{source}.jsonl", f"{source}.jsonl", "x", "jsonl", len(counts) * ROWS, 0)
        infos.append(SourceInfo(str(source), "completion", (file,), file.num_rows, 0, ROWS, 3.0, False))
    return DataPlan(str(folder), "f", LENGTH, WindowList(windows), WindowList(), tuple(infos), (), 0)


def write(plan: DataPlan, index: int) -> None:
    """A shard whose tokens name their row: ids are 1 + row in the source."""
    window = plan.windows[index]
    packs = int(window.key.rsplit("p", 1)[1])
    samples, rows, groups = [], [], []
    for number in range(packs):
        group = [number] if number < packs - 1 or packs == 0 else list(range(number, ROWS))
        groups.append(list(range(len(samples), len(samples) + len(group))))
        for row in group:
            value = 1 + window.spans[0].first_row + row
            samples.append(Sample(np.full(1 + row % 2, value, np.int32), np.ones(1 + row % 2, np.uint8)))
            rows.append(row)
    dropped = ROWS - len(rows)
    stats = ShardStats(ROWS, len(rows), packs, sum(len(s.ids) for s in samples), 0, dropped, 0)
    path = Path(plan.shard_path(window))
    if not path.exists():
        write_shard(str(path), samples, rows, groups, stats)


def ready(folder: Path, packs: list[list[int]]) -> DataPlan:
    plan = make_plan(folder, packs)
    for index in range(len(plan.windows)):
        write(plan, index)
    return plan


def read(
    plan: DataPlan,
    *,
    packs_per_step: int = 4,
    epochs: float = 1.0,
    seed: int = 0,
    place: dict[str, Any] | None = None,
    world: int = 1,
    packs_per_rank: int | None = None,
) -> list[list[StepPacks]]:
    """All steps, each as the list of what every rank got."""
    readers = [
        PackReader(
            plan,
            seed=seed,
            num_epochs=epochs,
            rank=rank,
            world_size=world,
            packs_per_step=packs_per_step,
            packs_per_rank=packs_per_rank,
            place=place,
        )
        for rank in range(world)
    ]
    steps = []
    while True:
        step = [reader.next_step() for reader in readers]
        if step[0] is None:
            assert all(part is None for part in step)
            return steps
        steps.append([part for part in step if part is not None])


def rows_of(steps: list[list[StepPacks]]) -> list[tuple[int, int]]:
    """(source, row) in global order."""
    return [
        (int(source), int(row))
        for step in steps
        for pack in packs_of(step)
        for source, row in zip(pack.sources, pack.sample_rows, strict=True)
    ]


def packs_of(step: list[StepPacks]) -> list[Pack]:
    """The step's packs in global order, put together from the ranks, without fillers."""
    packs = [part.packs[i] for i in range(len(step[0].packs)) for part in step]
    assert all(len(pack.sample_rows) for pack in packs[: len(step[0].drawn)])
    return packs[: len(step[0].drawn)]


def global_ids(step: list[StepPacks]) -> list[list[int]]:
    """input_ids of the step's packs in global order, put together from the ranks."""
    return [part.packs[i].input_ids.tolist() for i in range(len(step[0].packs)) for part in step]


shapes = st.lists(st.lists(st.integers(0, ROWS), min_size=1, max_size=14), min_size=1, max_size=3).filter(
    lambda packs: any(map(any, packs))
)
relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(packs=shapes, seed=st.integers(0, 3), accumulation=st.integers(1, 3))
def test_each_row_once_an_epoch_and_progress_ends_at_one(
    tmp_path: Path, packs: list[list[int]], seed: int, accumulation: int
) -> None:
    plan = ready(tmp_path, packs)
    steps = read(plan, packs_per_step=4 * accumulation, epochs=2, seed=seed)
    expected = Counter(
        (source, number * ROWS + row)
        for source, counts in enumerate(packs)
        for number, count in enumerate(counts)
        for row in range(ROWS if count else 0)
    )
    seen = Counter(rows_of(steps))
    assert seen == Counter({key: 2 * count for key, count in expected.items()})
    ends = [step[0].epoch for step in steps if step[0].end_of_epoch]
    assert ends == [1.0, 2.0]
    progress = [step[0].epoch for step in steps]
    assert progress == sorted(progress)
    assert steps[-1][0].cursor == 2 * sum(map(sum, packs))


@relaxed
@given(packs=shapes, seed=st.integers(0, 3), world=st.sampled_from([2, 4]))
def test_steps_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, packs: list[list[int]], seed: int, world: int
) -> None:
    plan = ready(tmp_path, packs)
    one, many = (read(plan, packs_per_step=8, seed=seed, world=size) for size in (1, world))
    assert [global_ids(step) for step in one] == [global_ids(step) for step in many]
    assert rows_of(one) == rows_of(many)
    for step in many:
        assert all(len(part.packs) == 8 // world for part in step)
        assert all(part.cursor == step[0].cursor and part.epoch == step[0].epoch for part in step)
        fillers = sum(not len(pack.sample_rows) for part in step for pack in part.packs)
        assert fillers == 8 - len(step[0].drawn)


@relaxed
@given(packs=shapes, seed=st.integers(0, 3), data=st.data())
def test_resuming_anywhere_equals_going_on(
    tmp_path: Path, packs: list[list[int]], seed: int, data: st.DataObject
) -> None:
    plan = ready(tmp_path, packs)
    steps = read(plan, packs_per_step=4, epochs=3, seed=seed)
    at = data.draw(st.integers(0, len(steps) - 1))
    resumed = read(
        plan, packs_per_step=4, epochs=3, seed=seed, place=json.loads(json.dumps(steps[at][0].place)), world=2
    )
    assert len(resumed) == len(steps) - at - 1
    for old, new in zip(steps[at + 1 :], resumed, strict=True):
        assert global_ids(old) == global_ids(new)
        assert (old[0].cursor, old[0].epoch, old[0].end_of_epoch) == (
            new[0].cursor,
            new[0].epoch,
            new[0].end_of_epoch,
        )
        assert old[0].drawn == new[0].drawn


@relaxed
@given(packs=shapes, seed=st.integers(0, 2), step=st.integers(1, 5))
def test_the_order_of_packs_does_not_depend_on_where_steps_begin(
    tmp_path: Path, packs: list[list[int]], seed: int, step: int
) -> None:
    plan = ready(tmp_path, packs)
    order = EpochOrder(plan, seed, 0, lambda window: int(plan.windows[window].key.rsplit("p", 1)[1]))
    drawn = []
    while (position := order.draw()) is not None:
        drawn.append(position)
        if len(drawn) % step == 0:
            order.exhausted()
    plain = EpochOrder(plan, seed, 0, lambda window: int(plan.windows[window].key.rsplit("p", 1)[1]))
    assert drawn == [plain.draw() for _ in drawn] and plain.draw() is None


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_a_step_for_six_is_the_same_for_any_number_of_workers(tmp_path: Path, world: int) -> None:
    """Micro-batches of two: workers get whole ones, all-masked where there is nothing more in the step."""
    plan = ready(tmp_path, [[3, 2, 4], [5]])
    per_rank = 2 * math.ceil(6 / (2 * world))
    split = read(plan, packs_per_step=6, epochs=2, world=world, packs_per_rank=per_rank)
    whole = read(plan, packs_per_step=6, epochs=2)
    assert len(whole) > 4 and rows_of(split) == rows_of(whole)
    for step, (wanted,) in zip(split, whole, strict=True):
        assert {part.drawn for part in step} == {wanted.drawn} and {part.cursor for part in step} == {
            wanted.cursor
        }
        assert {len(part.packs) for part in step} == {per_rank}
        assert sum(pack.num_targets for part in step for pack in part.packs) == sum(
            pack.num_targets for pack in wanted.packs
        )


def test_these_tests_are_not_vacuous(tmp_path: Path) -> None:
    """Seeds, epochs and cursors change the order; steps mix windows; packs are shuffled within one."""
    plan = ready(tmp_path, [[5] * 20, [4] * 6])
    first, other = rows_of(read(plan, seed=0)), rows_of(read(plan, seed=1))
    assert first != other and sorted(first) == sorted(other) and len(first) == 130
    both = rows_of(read(plan, epochs=2))
    assert both[:130] == first and both[130:] != first and sorted(both[130:]) == sorted(first)
    windows = [(source, row // ROWS) for source, row in first]
    changes = sum(a != b for a, b in zip(windows, windows[1:], strict=False))
    assert changes > 60, "consecutive packs come from different windows"
    window = [row for source, row in first if source == 0 and row < ROWS]
    assert window != sorted(window) or [r for s, r in other if s == 0 and r < ROWS] != sorted(window)


def test_every_part_of_an_epoch_sees_all_sources(tmp_path: Path) -> None:
    plan = ready(tmp_path, [[5] * 60, [5] * 20])
    sources = [int(pack.sources[0]) for step in read(plan) for pack in packs_of(step)]
    shares = [np.mean(sources[start : start + 100]) for start in range(0, 400, 100)]
    assert all(0.1 < share < 0.4 for share in shares), shares
    order = [plan.windows[index].source for index in window_order(plan, seed=3)]
    assert all(sum(order[start : start + 8]) == 2 for start in range(0, 80, 8))


def weighted(plan: DataPlan, weights: list[float]) -> DataPlan:
    value = plan.to_json()
    sources = [{**source, "weight": weight} for source, weight in zip(value["sources"], weights, strict=True)]
    return DataPlan.from_json({**value, "sources": sources})


@relaxed
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=4, max_size=4),
    seed=st.integers(0, 3),
    epochs=st.integers(1, 4),
)
def test_weights_are_shares_of_tokens_and_no_row_is_favoured(
    tmp_path: Path, counts: list[int], weights: list[float], seed: int, epochs: int
) -> None:
    """Every window has five packs of one row each, so that rows, packs and tokens are in proportion."""
    plan = weighted(ready(tmp_path, [[5] * count for count in counts]), weights[: len(counts)])
    rows = rows_of(read(plan, epochs=epochs, seed=seed))
    total, per_epoch = sum(weights[: len(counts)]), 5 * sum(counts)
    seen = Counter(rows)
    for source, count in enumerate(counts):
        share = weights[source] / total
        drawn = np.cumsum([one == source for one, _ in rows])
        ideal = share * np.arange(1, len(rows) + 1)
        assert np.abs(drawn - ideal).max() < 2 * len(counts), "all along the epoch"
        times = share * per_epoch * epochs / (5 * count)
        assert {seen[source, row] for row in range(5 * count)} <= {math.floor(times), math.ceil(times)}
    assert abs(len(rows) - epochs * per_epoch) <= len(counts)


@relaxed
@given(
    packs=shapes,
    weights=st.lists(st.sampled_from([0.2, 1.0, 2.5]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_resuming_anywhere_equals_going_on_with_weights(
    tmp_path: Path, packs: list[list[int]], weights: list[float], seed: int, data: st.DataObject
) -> None:
    plan = weighted(ready(tmp_path, packs), weights[: len(packs)])
    reader = PackReader(plan, seed=seed, num_epochs=4, rank=0, world_size=1, packs_per_step=4)
    try:
        steps = list(iter(reader.next_step, None))
    except DataError:
        return  # an epoch that reads windows without packs only
    at = data.draw(st.integers(0, len(steps) - 1))
    resumed = read(plan, packs_per_step=4, epochs=4, seed=seed, place=steps[at].place)
    assert [global_ids([step]) for step in steps[at + 1 :]] == [global_ids(step) for step in resumed]
    assert [step.epoch for step in steps[at + 1 :]] == [step[0].epoch for step in resumed]


def test_windows_are_prepared_before_training_waits_for_them(tmp_path: Path) -> None:
    """A tenth of a source with few windows is asked for at once, though its windows are far apart."""
    plan = weighted(make_plan(tmp_path, [[5] * 90, [5] * 4, [5] * 30]), [0.8, 0.1, 0.1])
    order = window_order(plan, seed=5)
    assert sorted(order) == list(range(124))
    assert {plan.windows[index].source for index in order[:10]} == {0, 1, 2}
    opened: list[int] = []

    def num_packs(window: int) -> int:
        if window not in opened:
            opened.append(window)
        return 5

    draws = EpochOrder(plan, 5, 0, num_packs)
    while draws.draw() is not None:
        pass
    late = [order.index(window) - at for at, window in enumerate(opened)]
    assert max(late) < 16, "of 124, at most so many windows before it are not needed yet"


def test_fractional_epochs_stop_at_their_share_of_rows(tmp_path: Path) -> None:
    plan = ready(tmp_path, [[5] * 20])
    assert len(rows_of(read(plan, epochs=0.5))) == 50
    assert len(rows_of(read(plan, epochs=1.25))) == 125
    assert read(plan, epochs=0.5)[-1][0].epoch == 0.5
    reader = PackReader(plan, seed=0, num_epochs=math.inf, rank=0, world_size=1, packs_per_step=100)
    assert [step.epoch for step in (reader.next_step() for _ in range(3)) if step] == [1.0, 2.0, 3.0]


def test_no_packs_at_all_is_an_error(tmp_path: Path) -> None:
    plan = ready(tmp_path, [[0, 0, 0]])
    with pytest.raises(DataError, match="no row became a pack"):
        read(plan, epochs=math.inf)


def test_sources_with_equal_rows_share_shards_but_not_row_numbers(tmp_path: Path) -> None:
    plan = ready(tmp_path, [[5, 5]])
    value = plan.to_json()
    again = {**value["sources"][0], "files": [{**value["sources"][0]["files"][0], "first_row": 1000}]}
    windows = [*value["windows"], *([1, *window[1:]] for window in value["windows"])]
    both = DataPlan.from_json({**value, "sources": [value["sources"][0], again], "windows": windows})
    assert sorted(rows_of(read(both))) == [(0, row) for row in range(10)] + [
        (1, 1000 + row) for row in range(10)
    ]


# -- shards that come later -----------------------------------------------------------------------


def test_a_reader_beside_the_pipeline_reads_the_same(tmp_path: Path) -> None:
    packs = [[5, 0, 3, 5, 2, 5, 5, 1, 0, 5, 4, 5], [5, 5, 0]]
    expected = read(ready(tmp_path / "ready", packs), epochs=2)
    plan = make_plan(tmp_path / "late", packs)

    def prepare() -> None:
        for index in reversed(window_order(plan, seed=0)):  # the worst order there is
            time.sleep(0.02)
            write(plan, index)

    thread = threading.Thread(target=prepare)
    thread.start()
    steps = read(plan, epochs=2)
    thread.join()
    assert [global_ids(step) for step in steps] == [global_ids(step) for step in expected]
    assert [step[0].epoch for step in steps] == [step[0].epoch for step in expected]
    waits = [step[0].wait_s for step in steps]
    assert waits[0] > 0.01 and waits[-1] == 0.0


def test_the_first_step_needs_few_shards(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [[5] * 100])
    for index in window_order(plan, seed=0)[:8]:
        write(plan, index)
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=4, timeout_s=0.1)
    assert reader.next_step() is not None


def test_waiting_ends_with_the_pipelines_failure(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [[5] * 3])
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=1)
    threading.Timer(0.1, publish_json, (plan.failure_path, {"error": "rows.jsonl is gone"})).start()
    with pytest.raises(DataError, match="rows.jsonl is gone"):
        reader.next_step()


def test_waiting_ends_when_no_shard_comes(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [[5] * 3])
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=1, timeout_s=0.15)
    with pytest.raises(DataError, match="no shard was prepared in"):
        reader.next_step()


# -- evaluation -----------------------------------------------------------------------------------


def test_held_out_packs_in_fixed_order(tmp_path: Path) -> None:
    made = ready(tmp_path, [[5, 0, 3], [2]])
    plan = DataPlan.from_json({**made.to_json(), "eval_windows": made.to_json()["windows"]})
    for world in (1, 2):
        readers = [EvalReader(plan, rank=rank, world_size=world, packs_per_step=4) for rank in range(world)]
        seen: list[list[int]] = []
        for cursor, count in ((4, 4), (8, 4), (10, 2)):
            step = [part for part in (reader.next_step() for reader in readers) if part is not None]
            assert step[0].cursor == cursor and len(step[0].drawn) == count
            assert step[0].end_of_epoch == (cursor == 10)
            seen += global_ids(step)[:count]
        assert all(reader.next_step() is None for reader in readers)
        assert [ids[0] for ids in seen] == [1, 2, 3, 4, 5, 11, 12, 13, 1, 2]


# -- counts of packs in one file -------------------------------------------------------------------


def write_counts(plan: DataPlan, *, leave_out: int = 0) -> None:
    writer = CountsWriter(plan)
    for window in plan.windows[leave_out:]:
        writer.add(window, int(window.key.rsplit("p", 1)[1]))
    writer.write()


def test_no_shard_is_asked_for_what_the_counts_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ready(tmp_path, [[3, 5, 0, 2], [1, 4]])
    expected = rows_of(read(plan, epochs=2))
    write_counts(plan)
    assert read_counts(plan).tolist() == [3, 5, 0, 2, 1, 4]
    monkeypatch.setattr("nemo_ray.data.reader.read_stats", None)
    assert rows_of(read(plan, epochs=2)) == expected


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "empty", "partial"])
def test_what_the_counts_do_not_say_the_shards_do(tmp_path: Path, damage: str) -> None:
    plan = ready(tmp_path, [[3, 5, 0, 2], [1, 4]])
    expected = rows_of(read(plan))
    write_counts(plan, leave_out=2 if damage == "partial" else 0)
    path = Path(counts_path(plan))
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    changed = {"short": data[:-3], "long": data + b"x", "flipped": flipped, "empty": b"", "partial": data}
    path.write_bytes(changed[damage])
    known = KnownCounts(plan)
    assert [known.of(index) for index in range(6)] == (
        [None, None, 0, 2, 1, 4] if damage == "partial" else [None] * 6
    )
    assert rows_of(read(plan)) == expected


def test_counts_of_another_shard_are_never_trained_on(tmp_path: Path) -> None:
    plan = ready(tmp_path, [[3, 5]])
    writer = CountsWriter(plan)
    for window in plan.windows:
        writer.add(window, 2)
    writer.write()
    with pytest.raises(DataError, match="says 2 packs of .*, which has [35]: it was made again"):
        read(plan)
