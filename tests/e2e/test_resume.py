"""Whatever kills a run, going on from its checkpoint ends where the uninterrupted run ends."""

import os
import re
import signal

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN, Command
from tests.e2e.compare import (
    assert_same_adapter,
    assert_same_course,
    assert_same_rows,
    train_rows,
)
from tests.e2e.world import PACKS_PER_STEP, World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SAVED = 4
TWO_WORKERS = {"ray": {"num_workers": 2}, "micro_batch_size": 2}


def last_step(run: RunDir) -> int:
    rows = train_rows(run)
    return rows[-1]["step"] if rows else 0


def wait_for_step(started: Command, run: RunDir, step: int) -> None:
    started.wait_until(lambda: last_step(run) >= step)


def killed_after_a_checkpoint(world: World, name: str, **changes: object) -> RunDir:
    """A run whose machine died two steps after a checkpoint."""
    run = world.run_dir(name)
    started = world.train(name, **changes)
    wait_for_step(started, run, SAVED + 2)
    started.kill_tree()
    assert run.newest_checkpoint() == run.checkpoint_dir(SAVED)
    assert not run.adapter_dir.exists() and "outcome" not in run.read_run()
    return run


def resumed(world: World, name: str, **changes: object) -> Command:
    """The same command again with `resume_from_checkpoint=auto`, to its end."""
    started = world.train(name, "resume_from_checkpoint=auto", **changes)
    assert started.end() == 0, started.output
    assert "Traceback" not in started.output and not started.errors, started.output
    assert started.leaves_nothing_behind(), started.tree()
    return started


def test_killed_and_resumed_equals_uninterrupted(world: World, reference: RunDir) -> None:
    run = killed_after_a_checkpoint(world, "killed")
    before = train_rows(run)
    assert_same_rows(before, train_rows(reference)[: len(before)], rtol=1e-5)  # the same YAML and seed twice
    again = resumed(world, "killed")
    assert re.search(rf"^resumes +{run.checkpoint_dir(SAVED)}$", again.output, re.MULTILINE), again.output
    assert "step 1/" not in again.output and "held-out loss 8" not in again.output.partition("step ")[0]
    assert_same_course(run, reference, rtol=1e-5)
    assert_same_adapter(run, reference, tolerance=1e-5)
    facts = run.read_run()
    assert facts["outcome"] == "finished" and len(facts["earlier"]) == 1


@pytest.mark.long
def test_resumed_on_another_number_of_workers(world: World, reference: RunDir) -> None:
    run = killed_after_a_checkpoint(world, "two-to-one", **TWO_WORKERS)
    resumed(world, "two-to-one", ray={"num_workers": 1}, micro_batch_size=PACKS_PER_STEP)
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
    facts = run.read_run()
    assert (facts["world_size"], facts["earlier"][0]["world_size"]) == (1, 2)


@pytest.mark.long
@pytest.mark.parametrize(
    "at_step",
    [
        pytest.param(SAVED + 2, id="after-a-checkpoint"),
        pytest.param(SAVED - 2, id="before-the-first", marks=pytest.mark.soak),
    ],
)
def test_a_killed_worker_is_replaced(world: World, reference: RunDir, at_step: int) -> None:
    name = f"worker-killed-at-{at_step}"
    run, started = world.run_dir(name), world.train(name, **TWO_WORKERS)
    wait_for_step(started, run, at_step)
    workers = [pid for pid, title in started.tree().items() if title.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2, started.tree()
    os.kill(workers[-1], signal.SIGKILL)
    assert started.end() == 0, started.output
    told = [line for line in started.output.splitlines() if "starting again" in line]
    (line,) = told
    assert re.match(
        rf"rank [01] \(host \S+, pid {workers[-1]}, in phase \w+ after step \d+\) was killed", line
    )
    assert "Traceback" not in started.output and not started.errors
    assert "(raylet)" not in started.output
    (failure,) = run.read_run()["failures"]
    assert failure["restart"] and failure["line"] in line and failure["time"].endswith("+00:00")
    assert started.leaves_nothing_behind(), started.tree()
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.soak
def test_killed_twice(world: World, reference: RunDir) -> None:
    """Also in the run that resumes, before and after a checkpoint of its own."""
    run = killed_after_a_checkpoint(world, "killed-twice")
    for step in (SAVED + 1, 2 * SAVED + 1):
        started = world.train("killed-twice", "resume_from_checkpoint=auto")
        # The rows after the checkpoint are there until the worker has loaded it.
        started.wait_until(lambda run=started: "checking the model" in run.output)
        wait_for_step(started, run, step)
        started.kill_tree()
    resumed(world, "killed-twice")
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.soak
def test_resuming_a_finished_run_changes_nothing(world: World, reference: RunDir) -> None:
    run = world.finished("finished-twice")
    resumed(world, "finished-twice")
    assert_same_course(run, reference)
    assert_same_adapter(run, reference, tolerance=1e-5)


@pytest.mark.soak
def test_an_earlier_checkpoint_by_its_path(world: World, reference: RunDir) -> None:
    """Later checkpoints of the same run are set aside, and the course is the same again."""
    run = world.finished("from-path")
    wanted = run.checkpoint_dir(SAVED)
    config = world.write_yaml(output_dir=str(run.path), resume_from_checkpoint=str(wanted))
    started = world.command(*TRAIN, str(config))
    assert started.end() == 0, started.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
    aside = [path.name for path in run.checkpoints_dir.iterdir() if ".superseded-" in path.name]
    assert sorted(name.partition(".")[0] for name in aside) == ["step-12", "step-8"]
