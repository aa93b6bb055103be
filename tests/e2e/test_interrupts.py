"""Ctrl-C on a real run: the first saves and ends, the second ends at once."""

import os
import signal
import time

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.compare import assert_same_adapter, assert_same_course, train_rows
from tests.e2e.world import NUM_STEPS, World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_saves_and_a_resumed_run_ends_equal(
    world: World, reference: RunDir, number: int
) -> None:
    """As a terminal sends Ctrl-C, and `timeout` and batch systems SIGTERM: to every process of the group."""
    name = f"interrupted-{number}"
    run = world.run_dir(name)
    changes = {"ray": {"num_workers": 2}, "micro_batch_size": 2, "save_steps": 100}
    started = world.train(name, **changes)
    started.wait_until(lambda: train_rows(run))
    if number == signal.SIGTERM:
        os.kill(started.process.pid, number)  # and then to all, itself among them
    os.killpg(started.process.pid, number)
    assert started.end(60) == 130, started.output
    assert "Traceback" not in started.output and not started.errors, started.output
    assert started.leaves_nothing_behind(), started.tree()
    step = train_rows(run)[-1]["step"]
    assert step < NUM_STEPS and run.newest_checkpoint() == run.checkpoint_dir(step)
    last_line = started.output.splitlines()[-1]
    assert "resume_from_checkpoint=auto" in last_line and str(run.checkpoint_dir(step)) in last_line
    assert run.read_run()["outcome"] == "stopped" and not run.stop_requested()
    assert not run.adapter_dir.exists()

    again = world.train(name, "resume_from_checkpoint=auto", **changes)
    assert again.end() == 0, again.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.soak
def test_a_second_ctrl_c_ends_at_once(world: World) -> None:
    run = world.run_dir("interrupted-twice")
    # Each step takes seconds: the first signal cannot have been served when the second one comes.
    started = world.train("interrupted-twice", gradient_accumulation_steps=32, num_epochs=100)
    started.wait_until(lambda: run.read_progress().get("phase") == "training")
    started.ctrl_c()
    started.wait_until(lambda: "stopping: saving a checkpoint" in started.output, 20)
    began = time.monotonic()
    started.ctrl_c()
    assert started.end(30) == 130, started.output
    assert time.monotonic() - began < 15
    assert "stopped at once: nothing more was saved" in started.output
    assert "Traceback" not in started.output, started.output
    assert started.leaves_nothing_behind(), started.tree()
    assert not any(run.checkpoints_dir.glob("step-*"))
