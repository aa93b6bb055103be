"""Two real commands on one output_dir: the second is refused while the first lives, and goes on after it."""

import contextlib
import os
import re
import signal

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train.driver_lock import FILE_NAME
from tests.e2e.compare import assert_same_adapter, assert_same_course, train_rows
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

REFUSED_WITHIN_S = 20.0
"""On a busy machine; on a free core it takes a second or two."""
SAVED = 4


def state(run: RunDir) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of all that is there; no time of the lock, which its holder touches."""
    found = {}
    for path in (run.path, *run.path.rglob("*")):
        status = path.stat()
        time_ns = 0 if path.name == FILE_NAME else status.st_mtime_ns
        found[str(path)] = (status.st_ino, time_ns, status.st_size)
    return found


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # an idle process of Ray's that ended by itself
            os.kill(pid, number)


def test_a_second_command_is_refused_until_the_first_is_dead(world: World, reference: RunDir) -> None:
    run = world.run_dir("two-drivers")
    first = world.train("two-drivers")
    first.wait_until(lambda: len(train_rows(run)) > SAVED + 1)
    # Nobody but the second command can change the folder now.
    others = [pid for pid in first.tree() if pid != first.process.pid]
    send(signal.SIGSTOP, others)
    before = state(run)
    for override in ("overwrite=true", "resume_from_checkpoint=auto"):
        second = world.train("two-drivers", override)
        assert second.end(REFUSED_WITHIN_S) == 2, second.output
        (line,) = second.errors
        assert f"another driver is at work in {run.path}: process {first.process.pid} on " in line
        assert second.output.splitlines() == [f"output: {run.path}", line], second.output
    assert state(run) == before
    os.kill(first.process.pid, signal.SIGKILL)
    send(signal.SIGCONT, others)  # its workers learn of it in a moment, and train on until then
    third = world.train("two-drivers", "resume_from_checkpoint=auto")
    assert third.end() == 0, third.output
    assert "Traceback" not in third.output and not third.errors, third.output
    assert re.search(rf"^resumes +{run.checkpoints_dir}/step-", third.output, re.MULTILINE), third.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
    first.process.wait(10)
    # Ray's agents (2.60) tell a GCS that is gone too of their raylet's end, and give up after a minute.
    assert first.leaves_nothing_behind(90) and third.leaves_nothing_behind()
    assert not (run.path / FILE_NAME).exists()


@pytest.mark.soak
def test_the_first_command_ends_as_if_no_second_had_come(world: World, reference: RunDir) -> None:
    run = world.run_dir("undisturbed")
    first = world.train("undisturbed")
    first.wait_until(lambda: train_rows(run))
    second = world.train("undisturbed", "overwrite=true")
    assert second.end(REFUSED_WITHIN_S) == 2, second.output
    assert first.end() == 0, first.output
    assert "Traceback" not in first.output and not first.errors, first.output
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)
    assert not (run.path / FILE_NAME).exists()
