"""A run whose shards lie in an object store that fails now and then, and one that finds a shard damaged."""

import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.data.shard_cache import default_folder
from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN, Command
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.world import World
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    """A store; the copies of its shards go with it."""
    before = copies()
    with ObjectStore() as made:
        yield made
    forget(copies() - before)


def copies() -> set[Path]:
    """The node's folders of copies."""
    return {folder for folder in default_folder().glob("*") if folder.is_dir()}


def forget(folders: set[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def start(world: World, name: str, store: ObjectStore, bucket: str, **changes: Any) -> Command:
    """Train over shards in the store."""
    config = world.write_yaml(
        output_dir=str(world.run_dir(name).path), dataset_prepared_path=f"s3://{bucket}/prepared", **changes
    )
    return world.command(*TRAIN, str(config), **store.environ())


def run(world: World, name: str, store: ObjectStore, bucket: str) -> RunDir:
    """The same, to its end."""
    command = start(world, name, store, bucket)
    assert command.end() == 0, command.output
    assert "Traceback" not in command.output and not command.errors, command.output
    return world.run_dir(name)


def test_a_failing_store_and_a_damaged_shard_change_nothing(
    world: World, reference: RunDir, store: ObjectStore
) -> None:
    before = copies()
    bucket = f"bucket-{secrets.token_hex(4)}"
    store.create_bucket(bucket)
    store.fail_some(0.1, seed=5, faults=("500", "503", "reset", "lost reply"))
    first = run(world, "stored", store, bucket)
    assert_same_course(first, reference)
    assert_same_adapter(first, reference)
    assert any(request.fault for request in store.requests)
    assert not (first.path / "prepared").exists() and "not-a-secret" not in first.run_json.read_text()

    store.fail_always(None)
    whole = store.objects(bucket)
    key = next(key for key in sorted(whole) if key.endswith(".arrow"))
    store.put(bucket, key, whole[key][:400] + b"?" + whole[key][401:])
    forget(copies() - before)  # a node that has none
    second = run(world, "stored-again", store, bucket)
    assert_same_course(second, reference)
    assert store.objects(bucket) == whole


@pytest.mark.soak
def test_a_store_that_is_away_for_20_s_is_waited_for(
    world: World, reference: RunDir, store: ObjectStore
) -> None:
    """As soon as the first row is there, so while shards are still prepared and read."""
    bucket = f"bucket-{secrets.token_hex(4)}"
    store.create_bucket(bucket)
    started, away = start(world, "away", store, bucket), world.run_dir("away")
    started.wait_until(lambda: any(key.endswith(".arrow") for key in store.objects(bucket)))
    store.fail_always("reset")
    began = len(store.requests)
    time.sleep(20)
    assert len(store.requests) > began, "nothing was asked of the store meanwhile"
    store.fail_always(None)
    assert started.end() == 0, started.output
    assert "Traceback" not in started.output and not started.errors, started.output
    assert_same_course(away, reference)
