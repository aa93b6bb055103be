"""Shards that are not as they were written: told, and prepared again."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.config.schema import DataSection
from nemo_ray.data import sources
from nemo_ray.data.encode import Sample
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import repairer
from nemo_ray.data.reader import EvalReader, PackReader, StepPacks
from nemo_ray.data.shards import DamagedShardError, Shard, ShardStats, read_stats, write_shard
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import existing_stats, sum_shards
from nemo_ray.errors import DataError
from tests.data.helpers import chats, prepare_all, section, write_lines


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("shard") / "x.arrow"
    samples = [Sample(np.arange(n, dtype=np.int32), np.ones(n, np.uint8)) for n in (3, 5, 2, 7)]
    rejected = ((4, "no field 'messages'", "ü"),)
    stats = ShardStats(5, 4, 2, 17, 13, 0, 0, {"no field 'messages'": 1}, rejected)
    write_shard(str(path), samples, [0, 1, 2, 3], [[0, 3], [1, 2]], stats)
    return path.read_bytes()


def content(path: Path) -> tuple[object, ...]:
    shard = Shard(str(path))
    packs = [
        shard.pack(index, shard.rows(index).astype(np.int64), 0, 16, 0) for index in range(shard.num_packs)
    ]
    return shard.stats, [(pack.input_ids.tobytes(), pack.labels.tobytes()) for pack in packs]


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_told(
    written: bytes, place: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    whole, path = folder / "whole.arrow", folder / "flipped.arrow"
    whole.write_bytes(written)
    data = bytearray(written)
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DamagedShardError) as caught:
        content(path)
    assert str(caught.value).startswith(f"shard {path} is damaged (") and "\n" not in str(caught.value)
    with contextlib.suppress(DamagedShardError):
        assert read_stats(str(path)) == read_stats(str(whole))


@given(length=st.floats(0, 1, exclude_max=True))
def test_a_cut_shard_is_told(written: bytes, length: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.arrow"
    path.write_bytes(written[: int(length * len(written))])
    for read in (Shard, read_stats):
        with pytest.raises(DamagedShardError, match=r"x.arrow is damaged \("):
            read(str(path))


def test_statistics_longer_than_the_tail_that_is_read(tmp_path: Path) -> None:
    rejected = tuple((row, "too long", "x" * 200) for row in range(1000))
    stats = ShardStats(1000, 0, 0, 0, 0, 0, 0, {"too long": 1000}, rejected)
    write_shard(str(tmp_path / "x.arrow"), [], [], [], stats)
    assert (tmp_path / "x.arrow").stat().st_size > 200_000
    assert read_stats(str(tmp_path / "x.arrow")) == stats == Shard(str(tmp_path / "x.arrow")).stats


# -- what becomes of a damaged shard --------------------------------------------------------------


@pytest.fixture
def prepared(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DataPlan, DataSection]:
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    data = section(write_lines(tmp_path / "rows.jsonl", chats(300, words=6)), val_set_size=0.1)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    prepare_all(plan, data, base)
    return plan, data


def flip_tokens(path: str) -> bytes:
    """Change one token in the middle of a shard; returns what was there."""
    before = Path(path).read_bytes()
    data = bytearray(before)
    data[len(data) // 2] ^= 1
    Path(path).write_bytes(data)
    return before


def steps_of(plan: DataPlan, **options: object) -> list[StepPacks]:
    reader = PackReader(
        plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=4, timeout_s=5, **options
    )
    return list(iter(reader.next_step, None))


def test_readers_prepare_damaged_shards_again(base: Path, prepared: tuple[DataPlan, DataSection]) -> None:
    plan, data = prepared
    expected = [pack.input_ids.tobytes() for step in steps_of(plan) for pack in step.packs]
    repair = repairer(plan, data, str(base))
    before = {}
    for window in (plan.windows[0], plan.windows[2], plan.eval_windows[0]):
        path = plan.shard_path(window)
        before[path] = flip_tokens(path)
    cut = plan.shard_path(plan.windows[1])
    before[cut] = Path(cut).read_bytes()
    Path(cut).write_bytes(before[cut][:1000])
    assert expected == [
        pack.input_ids.tobytes() for step in steps_of(plan, repair=repair) for pack in step.packs
    ]
    evaluation = EvalReader(plan, rank=0, world_size=1, packs_per_step=1, repair=repair)
    assert len(list(iter(evaluation.next_step, None))) > 1
    assert {path: Path(path).read_bytes() for path in before} == before


def test_without_repair_a_damaged_shard_is_told_and_removed(prepared: tuple[DataPlan, DataSection]) -> None:
    plan, _ = prepared
    path = plan.shard_path(plan.windows[0])
    flip_tokens(path)
    with pytest.raises(DataError, match=rf"shard {path} is damaged .*; start again, and it is prepared"):
        steps_of(plan)
    assert not Path(path).exists()


def test_a_cut_shard_counts_as_missing(prepared: tuple[DataPlan, DataSection]) -> None:
    plan, _ = prepared
    path = Path(plan.shard_path(plan.windows[1]))
    path.write_bytes(path.read_bytes()[:-100])
    stats = list(existing_stats(plan, plan.windows))
    assert [entry is None for entry in stats] == [index == 1 for index in range(len(plan.windows))]
    assert sum_shards(plan, plan.windows).windows == len(plan.windows) - 1
