"""Shards in an object store: written there, read through the node's cache, waited for; two runs at once."""

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nemo_ray.config.schema import DataSection
from nemo_ray.data import shard_cache, sources, waiting
from nemo_ray.data.encode import Sample
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import prepare_window, repairer, window_task
from nemo_ray.data.reader import PackReader, StepPacks
from nemo_ray.data.shard_cache import ShardCache, open_shard
from nemo_ray.data.shards import DamagedShardError, ShardStats, read_stats, write_shard
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics
from nemo_ray.errors import DataError
from nemo_ray.storage import exists, publish_json, remove
from tests.data.helpers import chats, prepare_all, section, write_lines
from tests.object_store import ObjectStore, use

PREPARED = "s3://bucket/prepared"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket("bucket")
        yield store


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    use(server, monkeypatch)
    for key in server.objects("bucket"):
        server.client().delete_object(Bucket="bucket", Key=key)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    return server


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    return section(write_lines(tmp_path / "rows.jsonl", chats(300, words=6)), val_set_size=0.1)


def steps_of(plan: DataPlan, **options: object) -> list[StepPacks]:
    reader = PackReader(
        plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=4, **{"timeout_s": 20, **options}
    )
    return list(iter(reader.next_step, None))


def contents(steps: list[StepPacks]) -> list[bytes]:
    return [
        array.tobytes()
        for step in steps
        for pack in step.packs
        for array in (pack.input_ids, pack.labels, pack.position_ids)
    ]


def test_packs_over_a_store_that_fails_now_and_then_are_the_local_ones(
    base: Path, tmp_path: Path, store: ObjectStore, data: DataSection
) -> None:
    here = plan_data(data, str(base), str(tmp_path / "here"))
    prepare_all(here, data, base)
    plan = plan_data(data, str(base), PREPARED)
    store.fail_some(0.15, seed=3)
    prepare_all(plan, data, base)
    steps = steps_of(plan)
    assert len(steps) > 10 and contents(steps) == contents(steps_of(here))
    assert data_statistics(plan) == data_statistics(here)
    assert sum(request.fault is not None for request in store.requests) > 5
    store.fail_always(None)
    assert store.objects("bucket") == {
        f"prepared/{path.name}": path.read_bytes() for path in Path(here.directory).iterdir()
    }


def test_a_resumed_reader_goes_on_where_it_was(base: Path, store: ObjectStore, data: DataSection) -> None:
    plan = plan_data(data, str(base), PREPARED)
    prepare_all(plan, data, base)
    steps = steps_of(plan)
    assert contents(steps_of(plan, place=steps[5].place)) == contents(steps[6:])


def test_a_task_leaves_what_another_run_has_made_meanwhile(
    base: Path, tmp_path: Path, store: ObjectStore, data: DataSection
) -> None:
    from nemo_ray.data.pipeline import prepare_task  # imports Ray

    for directory in (str(tmp_path / "here"), PREPARED):
        plan = plan_data(data, str(base), directory)
        task = window_task(plan, plan.windows[0], data, str(base), held_out=False)
        first = prepare_task(task)
        (tmp_path / "rows.jsonl").rename(tmp_path / "away")  # nothing could be prepared now
        assert prepare_task(task) == first and not first["error"]
        remove(task.path)
        assert prepare_task(task)["error"]
        (tmp_path / "away").rename(tmp_path / "rows.jsonl")


def big_shard(path: str, seed: int = 0) -> ShardStats:
    """A shard of 2.5 MB."""
    ids = np.random.default_rng(seed).integers(0, 100_000, 500_000, dtype=np.int32)
    stats = ShardStats(1, 1, 1, len(ids), 1, 0, 0)
    write_shard(path, [Sample(ids, np.ones(len(ids), np.uint8))], [0], [[0]], stats)
    return stats


def test_statistics_are_read_without_the_rest(store: ObjectStore) -> None:
    stats = big_shard(f"{PREPARED}/big.arrow")
    with store.recorded() as requests:
        assert read_stats(f"{PREPARED}/big.arrow") == stats
    assert [request.method for request in requests] == ["HEAD", "GET"]
    assert sum(request.num_bytes for request in requests) <= 64 << 10


# -- the cache ------------------------------------------------------------------------------------


def downloads(store: ObjectStore, since: int = 0) -> int:
    return sum(request.num_bytes > 1_000_000 for request in store.requests[since:])


def test_a_shard_is_fetched_once_a_node(store: ObjectStore) -> None:
    stats = big_shard(f"{PREPARED}/big.arrow")
    before = len(store.requests)
    opened = []
    threads = [
        threading.Thread(target=lambda: opened.append(open_shard(f"{PREPARED}/big.arrow"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [shard.stats for shard in opened] == [stats] * 4 and downloads(store, before) == 1
    assert shard_cache.default_folder().is_relative_to(tempfile.gettempdir())


def test_the_cache_keeps_its_limit_and_what_was_used_last(store: ObjectStore, tmp_path: Path) -> None:
    urls = [f"{PREPARED}/{number}.arrow" for number in range(4)]
    for number, url in enumerate(urls):
        big_shard(url, number)
    cache = ShardCache(tmp_path / "cache", limit_bytes=8_000_000)  # three of them
    first = cache.open(urls[0])
    for number in (1, 2, 0, 3):
        cache.open(urls[number])
        time.sleep(0.01)
    kept = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert kept == {"0.arrow", "2.arrow", "3.arrow"}
    cache = ShardCache(tmp_path / "cache", limit_bytes=1)
    cache.open(urls[1])
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {"1.arrow"}
    assert first.pack(0, np.zeros(1, np.int64), 0, 500_000, 0).num_tokens == 500_000  # still mapped


def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_told(store: ObjectStore) -> None:
    url = f"{PREPARED}/big.arrow"
    open_shard_of = big_shard(url)
    assert open_shard(url).stats == open_shard_of
    (copy,) = shard_cache.default_folder().glob("*/*.arrow")
    data = bytearray(copy.read_bytes())
    data[1_000_000] ^= 1
    copy.unlink()
    copy.write_bytes(data)
    assert open_shard(url).stats == open_shard_of
    store.put("bucket", "prepared/big.arrow", bytes(data))
    copy.unlink()
    with pytest.raises(DamagedShardError, match=f"shard {url} is damaged"):
        open_shard(url)
    assert not list(shard_cache.default_folder().glob("*/*.arrow"))


def test_readers_replace_a_damaged_object(base: Path, store: ObjectStore, data: DataSection) -> None:
    plan = plan_data(data, str(base), PREPARED)
    prepare_all(plan, data, base)
    before = store.objects("bucket")
    key = f"prepared/{plan.windows[0].key}.arrow"
    store.put("bucket", key, before[key][:500] + b"?" + before[key][501:])
    assert len(steps_of(plan, repair=repairer(plan, data, str(base)))) > 10
    assert store.objects("bucket") == before


# -- waiting --------------------------------------------------------------------------------------


def test_waiting_asks_seldom_and_goes_on(base: Path, store: ObjectStore, data: DataSection) -> None:
    plan = plan_data(data, str(base), PREPARED)

    def write_later() -> None:
        time.sleep(1.5)
        prepare_all(plan, data, base)

    writer = threading.Thread(target=write_later)
    writer.start()
    steps = steps_of(plan)
    writer.join()
    looked = [r for r in store.requests if r.method == "HEAD" and "failed-" in r.path]
    assert len(steps) > 10 and steps[0].wait_s > 1 > steps[-1].wait_s
    assert 3 <= len(looked) <= 12


def test_waiting_ends_with_a_failure_or_its_time(
    base: Path, store: ObjectStore, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_FIRST_REMOTE_POLL_S", 0.05)
    plan = plan_data(data, str(base), PREPARED)
    with pytest.raises(DataError, match=f"no shard was prepared in {PREPARED} for 0 s"):
        steps_of(plan, timeout_s=0.3)
    publish_json(plan.failure_path, {"error": "rows.jsonl is gone"})
    with pytest.raises(DataError, match="rows.jsonl is gone"):
        steps_of(plan)
    remove(plan.failure_path)
    assert not exists(plan.failure_path)


# -- two runs at once -----------------------------------------------------------------------------


def _prepare(plan: DataPlan, data: DataSection, base: str, barrier: "multiprocessing.Barrier") -> None:
    barrier.wait(60)
    for window in plan.windows:
        prepare_window(window_task(plan, window, data, base, held_out=False))


@pytest.mark.parametrize("where", ["folder", "store"])
def test_two_processes_that_prepare_the_same_do_not_disturb_each_other(
    base: Path, tmp_path: Path, store: ObjectStore, data: DataSection, where: str
) -> None:
    alone = plan_data(data, str(base), str(tmp_path / "alone"))
    prepare_all(alone, data, base, alone.windows)
    directory = str(tmp_path / "both") if where == "folder" else PREPARED
    plan = plan_data(data, str(base), directory)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare, args=(plan, data, str(base), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(steps_of(plan)) == contents(steps_of(alone))
    expected = {path.name: path.read_bytes() for path in Path(alone.directory).iterdir()}
    if where == "folder":
        assert {path.name: path.read_bytes() for path in Path(directory).iterdir()} == expected
    else:
        assert {key.split("/")[1]: data for key, data in store.objects("bucket").items()} == expected
