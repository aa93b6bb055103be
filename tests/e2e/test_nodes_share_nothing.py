"""Nodes that share no folder: the run lies in an object store, and one of them dies."""

from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN
from tests.e2e.compare import assert_same_course, assert_same_tensors
from tests.e2e.nodes import nodes
from tests.e2e.test_run_in_a_store import ADAPTER, seen
from tests.e2e.world import World
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]
ROOM_FOR_ONE = '{"seat": 1}'


def test_a_node_is_lost_and_replaced_by_one_that_knows_nothing(
    world: World, reference: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, here = "s3://runs/scattered", str(tmp_path / "head")
    with ObjectStore() as store:
        store.create_bucket("runs")
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        with nodes(tmp_path, 3, ROOM_FOR_ONE, XDG_CACHE_HOME=here) as cluster:
            lost = cluster.add(1, ROOM_FOR_ONE, XDG_CACHE_HOME=str(tmp_path / "second"))
            ray = {
                "address": cluster.address,
                "num_workers": 2,
                "resources_per_worker": {"CPU": 1, "seat": 1},
            }
            changes = {"output_dir": url, "dataset_prepared_path": None, "micro_batch_size": 2, "ray": ray}
            config = world.write_yaml(**changes)
            started = world.command(*TRAIN, str(config), **cluster.environment)
            started.wait_until(lambda: "scattered/checkpoints/step-4/state.json" in store.objects("runs"))
            lost.kill_tree()
            cluster.add(1, ROOM_FOR_ONE, XDG_CACHE_HOME=str(tmp_path / "third"))
            assert started.end() == 0, started.output
        assert "Traceback" not in started.output and not started.errors, started.output
        run = seen(url, tmp_path / "look", monkeypatch)
    assert_same_course(run, reference)
    assert_same_tensors(run.adapter_dir / ADAPTER, reference.adapter_dir / ADAPTER)
    # Each node has its own folder, and that of a worker holds nothing that only the driver's should.
    (own,) = (tmp_path / "second" / "nemo_ray").iterdir()
    assert not (own / "run.json").exists() and not (own / "metrics.jsonl").exists()
