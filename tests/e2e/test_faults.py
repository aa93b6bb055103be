"""What happens to a run from outside, by the real command: it ends as the uninterrupted run, or says why.

Killed and frozen workers, two drivers, poisoned rows and failing stores have files of their own.
"""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint_files import damage
from tests.e2e.command import TRAIN, Command
from tests.e2e.compare import assert_same_adapter, assert_same_course, train_rows
from tests.e2e.test_resume import SAVED, TWO_WORKERS, killed_after_a_checkpoint, resumed, wait_for_step
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


def asides(run: RunDir) -> set[Path]:
    """Checkpoints that are being written, or that a kill has left behind."""
    return set(run.checkpoints_dir.glob(".attempts/*/step-*"))


def kill_while_a_checkpoint_is_written(started: Command, run: RunDir) -> bool:
    """SIGKILL to all of its processes as soon as a checkpoint begins; whether it had no name by then."""
    wait_for_step(started, run, len(train_rows(run)) + 1)
    pids = list(started.tree())  # looking for them takes longer than writing
    before, until = asides(run), time.monotonic() + 60
    while not (new := asides(run) - before):
        assert time.monotonic() < until and started.process.poll() is None, started.output
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # one of Ray's that ended by itself
            os.kill(pid, signal.SIGKILL)
    started.kill_tree()
    return any(path.exists() for path in new)


def test_killed_while_a_checkpoint_is_written(world: World, reference: RunDir) -> None:
    run, changes = world.run_dir("killed-while-saving"), {**TWO_WORKERS, "save_steps": 1}
    for _ in range(4):
        started = world.train("killed-while-saving", "resume_from_checkpoint=auto", **changes)
        caught = kill_while_a_checkpoint_is_written(started, run)
        assert not any(damage(folder, 0, 1) for folder in run.complete_checkpoints())
        if caught:
            break
    assert caught, "no kill came while a checkpoint was written"
    resumed(world, "killed-while-saving", **changes)
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
    assert not asides(run)


@pytest.mark.soak
def test_a_truncated_checkpoint_is_told_and_the_one_before_it_goes_on(
    world: World, reference: RunDir
) -> None:
    run = killed_after_a_checkpoint(world, "truncated", save_steps=2)
    newest = run.newest_checkpoint()
    assert newest == run.checkpoint_dir(SAVED + 2) or newest == run.checkpoint_dir(SAVED)
    file = newest / "rank-0.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    again = resumed(world, "truncated", save_steps=2)
    assert f"note: checkpoint {newest.name} is damaged: rank-0.safetensors has " in again.output
    assert_same_course(run, reference, rtol=1e-5)
    assert_same_adapter(run, reference, tolerance=1e-5)


@pytest.mark.soak
def test_checkpoints_become_read_only(world: World, reference: RunDir) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("no setpriv command: root would write all the same")
    as_anybody = (setpriv, "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    run = world.run_dir("read-only")
    config = world.write_yaml(output_dir=str(run.path))
    started = world.command(*as_anybody, *TRAIN, str(config))
    started.wait_until(lambda: run.checkpoint_steps() == [SAVED])
    run.checkpoints_dir.chmod(0o555)
    try:
        assert started.end() == 1, started.output
    finally:
        run.checkpoints_dir.chmod(0o755)
    (line,) = started.errors
    assert f"{run.checkpoint_dir(2 * SAVED)} could not be written: " in line and "Permission denied" in line
    assert started.leaves_nothing_behind(), started.tree()
    assert run.checkpoint_steps() == [SAVED]
    resumed(world, "read-only")
    assert_same_course(run, reference, rtol=1e-5)


@pytest.mark.soak
def test_sigterm_saves_and_a_resumed_run_ends_equal(world: World, reference: RunDir) -> None:
    run = world.run_dir("terminated")
    started = world.train("terminated", save_steps=100)
    wait_for_step(started, run, 3)
    os.kill(started.process.pid, signal.SIGTERM)
    assert started.end(60) == 130, started.output
    assert not started.errors and started.leaves_nothing_behind()
    assert run.checkpoint_steps() == [train_rows(run)[-1]["step"]]
    resumed(world, "terminated", save_steps=100)
    assert_same_course(run, reference, rtol=1e-5)
    assert_same_adapter(run, reference, tolerance=1e-5)
