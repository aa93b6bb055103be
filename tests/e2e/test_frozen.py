"""A worker that is stopped, not dead: nobody's connection breaks, and the run goes on all the same."""

import os
import re
import signal

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.test_resume import SAVED, TWO_WORKERS, wait_for_step
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]


def test_a_frozen_worker_is_told_with_its_stack_and_replaced(world: World, reference: RunDir) -> None:
    run = world.run_dir("frozen")
    config = world.write_yaml(output_dir=str(run.path), **TWO_WORKERS)
    # Half of the default. On a busy machine of two cores a worker may well need some seconds for an answer.
    started = world.command(*TRAIN, str(config), RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="30")
    wait_for_step(started, run, SAVED + 2)
    frozen = [pid for pid, title in started.tree().items() if title.startswith("ray::RayTrainWorker")][-1]
    os.kill(frozen, signal.SIGSTOP)
    assert started.end() == 0, started.output
    (told,) = [line for line in started.output.splitlines() if "starting again" in line]
    found = re.fullmatch(
        rf"rank ([01]) \(host \S+, pid {frozen}, in phase \w+ after step (\d+)\) is stopped by a signal "
        rf"and made no progress for \d+ s; its stack is in {run.error_file}: starting again from "
        rf"step-{SAVED}",
        told,
    )
    assert found is not None, told
    assert int(found[2]) >= SAVED + 2
    log = run.error_file.read_text()
    assert f"Process {frozen}" in log and "train_worker (" in log, log
    assert "Traceback" not in started.output and not started.errors
    assert started.leaves_nothing_behind(), started.tree()  # the stopped process is among them
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
