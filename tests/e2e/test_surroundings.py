"""What changes around a run and is none of its business: the clock, and what others put on its cluster."""

import re
import sys
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.nodes import nodes
from tests.e2e.test_resume import TWO_WORKERS, wait_for_step
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# Python loads it at its start, in the driver and in all of Ray's processes.
CLOCK = """
import os, time
_time, _time_ns = time.time, time.time_ns
def _offset():
    try:
        with open(os.environ["CLOCK_OFFSET"]) as file:
            return int(file.read() or 0)
    except FileNotFoundError:
        return 0
time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 10**9
"""
HOG = """
import collections, sys
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = collections.deque(maxlen=40)
while True:
    held.append(ray.put(np.ones(2**24, np.uint8)))
    if len(held) == held.maxlen:
        print("full", flush=True)
"""
HELD_BYTES = 40 * 2**24
"""By the hog: more than the 256 MiB that a node's object store has here, so that it spills all the time."""


@pytest.mark.soak
def test_the_clock_jumps(world: World, reference: RunDir, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    offset = tmp_path / "offset"
    run = world.run_dir("other-clock")
    config = world.write_yaml(output_dir=str(run.path), **TWO_WORKERS)
    started = world.command(*TRAIN, str(config), PYTHONPATH=str(tmp_path), CLOCK_OFFSET=str(offset))
    wait_for_step(started, run, 2)
    offset.write_text("7200")
    wait_for_step(started, run, 6)
    offset.write_text("-86400")
    assert started.end() == 0, started.output
    assert not started.errors and "starting again" not in started.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.soak
def test_others_fill_the_object_store(world: World, reference: RunDir, tmp_path: Path) -> None:
    """While its data is prepared, and while it trains."""
    with nodes(tmp_path, 4) as cluster:
        hog = world.command(sys.executable, "-c", HOG, cluster.address, **cluster.environment)
        hog.wait_until(lambda: "full" in hog.output)
        run = world.run_dir("crowded")
        changes = {**TWO_WORKERS, "ray": {"num_workers": 2, "address": cluster.address}}
        prepared = str(world.folder / "prepared-crowded")
        config = world.write_yaml(output_dir=str(run.path), dataset_prepared_path=prepared, **changes)
        started = world.command(*TRAIN, str(config), **cluster.environment)
        assert started.end() == 0, started.output
        assert hog.process.poll() is None, hog.output
        spilled = Path(cluster.temp_dir).rglob("ray_spilled_objects*/*")
        assert sum(file.stat().st_size for file in spilled) > HELD_BYTES // 2
        hog.kill_tree()
    assert not started.errors and "starting again" not in started.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.long
def test_verbose_brings_the_logs_of_ray_and_the_workers(world: World, reference: RunDir) -> None:
    run = world.train("verbose", "--verbose", max_steps=2, eval_steps=None, test_datasets=[])
    assert run.end() == 0, run.output
    assert re.search(r"INFO rank 0 step 2 nemo_ray\.train\.loop: saving", run.output), run.output
    assert "Started a local Ray instance" in run.output
    quiet = world.output_of("reference")
    assert "INFO" not in quiet and "Started a local Ray" not in quiet
