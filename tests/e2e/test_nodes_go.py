"""Nodes die, are taken back, or come late: the run goes on elsewhere, or waits, as if nothing had been."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN, Command
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.nodes import BIN, Nodes, nodes
from tests.e2e.test_resume import SAVED, wait_for_step
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]
ROOM_FOR_ONE = '{"seat": 1}'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, each with room for one worker."""
    with nodes(tmp_path, 3, ROOM_FOR_ONE) as made:
        yield made


def train(
    world: World, name: str, cluster: Nodes, num_workers: Any, wait_for_nodes_s: float = 0.0, **changes: Any
) -> Command:
    """The reference's steps, split over two workers."""
    ray = {
        "address": cluster.address,
        "num_workers": num_workers,
        "resources_per_worker": {"CPU": 1, "seat": 1},
        "wait_for_nodes_s": wait_for_nodes_s,
    }
    output = str(world.run_dir(name).path)
    config = world.write_yaml(output_dir=output, micro_batch_size=2, ray=ray, **changes)
    return world.command(*TRAIN, str(config), **cluster.environment)


def ends_like(started: Command, run: RunDir, reference: RunDir) -> None:
    assert started.end() == 0, started.output
    assert "Traceback" not in started.output and not started.errors, started.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


def test_a_node_that_comes_late_is_waited_for(world: World, reference: RunDir, cluster: Nodes) -> None:
    run, refused = world.run_dir("node-late"), train(world, "node-late", cluster, 2)
    assert refused.end() == 1
    (line,) = refused.errors
    assert "room for 1; " in line and "ray.wait_for_nodes_s=600 waits" in line
    started = train(world, "node-late", cluster, 2, wait_for_nodes_s=200)
    started.wait_until(lambda: "waiting for nodes, 200 s at most: 2 workers with" in started.output)
    cluster.add(1, ROOM_FOR_ONE)
    ends_like(started, run, reference)


def test_a_lost_node_leaves_fewer_workers(world: World, reference: RunDir, cluster: Nodes) -> None:
    lost = cluster.add(1, ROOM_FOR_ONE)
    run, started = world.run_dir("node-lost"), train(world, "node-lost", cluster, [1, 2])
    wait_for_step(started, run, SAVED + 1)
    assert run.read_run()["world_size"] == 2
    lost.kill_tree()
    ends_like(started, run, reference)
    assert run.read_run()["world_size"] == 1


def test_a_lost_node_is_replaced(world: World, reference: RunDir, cluster: Nodes) -> None:
    lost = cluster.add(1, ROOM_FOR_ONE)
    run, started = world.run_dir("node-replaced"), train(world, "node-replaced", cluster, 2)
    wait_for_step(started, run, SAVED + 1)
    lost.kill_tree()
    cluster.add(1, ROOM_FOR_ONE)
    ends_like(started, run, reference)


def test_a_node_that_is_taken_back_costs_no_step(world: World, cluster: Nodes) -> None:
    """Ray asks every 5 s, so the run is longer than the others."""
    longer = {"max_steps": 120, "save_steps": 100, "eval_steps": 60, "learning_rate": 1e-3}
    left_alone = world.finished("left-alone", **longer)
    cluster.add(1, ROOM_FOR_ONE)
    run = world.run_dir("node-reclaimed")
    started = train(world, "node-reclaimed", cluster, [1, 2], **longer)
    wait_for_step(started, run, 2)
    drain(world, cluster)
    started.wait_until(lambda: run.checkpoint_steps())
    saved = run.checkpoint_steps()[0]
    assert saved != 100, "it was not saved for the node"
    ends_like(started, run, left_alone)
    assert f"a node of this run is being taken back (preempted): saved after step {saved}" in started.output


def drain(world: World, cluster: Nodes) -> None:
    """Tell Ray that the second node goes away, as a cloud's spot instance does."""
    script = (
        "import ray; from ray._raylet import GcsClient; from ray.core.generated import autoscaler_pb2 as pb\n"
        f"node, = [n for n in (ray.init({cluster.address!r}, logging_level='ERROR'), ray.nodes())[1]\n"
        "  if n['NodeManagerAddress'] == '127.0.0.2']\n"
        f"print(GcsClient(address={cluster.address!r}).drain_node(node['NodeID'],\n"
        "  pb.DRAIN_NODE_REASON_PREEMPTION, 'spot', __import__('time').time_ns() // 10**6 + 60_000))\n"
    )
    told = world.command(str(BIN / "python"), "-c", script, **cluster.environment)
    assert told.end(60) == 0, told.output
