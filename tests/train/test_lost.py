"""Which worker is told as lost, where it was and why, and how often workers start again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train import lost, processes
from nemo_ray.train.lost import find_out
from nemo_ray.train.processes import Look, look
from nemo_ray.train.restarts import Restarts
from nemo_ray.train.watchdog import RankState, Watchdog

ECHO = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4033")
_OWN = 'File "/x/train/update.py", line 60 in __call__\n  File "/x/train/loop.py", line 9 in step'
IN_A_COLLECTIVE = f'Thread 0x1:\n  File "/x/torch/distributed/c10d.py", line 5 in wait\n  {_OWN}\n'
HANGS = f'Thread 0x2:\n  File "/x/ray/worker.py", line 1 in poll\n\nThread 0x1:\n  {_OWN}\n'


class RayError(Exception):
    """Known by its module, as Ray's own are."""

    __module__ = "ray.exceptions"


class WorkerHealthCheckTimeoutError(RayError):
    __module__ = "ray.exceptions"


GONE = RayError("The actor is dead because its worker process has died.")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "GRACE_S", 0.0)


def say(run: RunDir, rank: int, stack: str = "", pid: int = 0, phase: str = "training") -> None:
    """What a rank leaves that has done 7 steps."""
    with Watchdog(run.rank_file(rank), rank, 10.0) as watchdog:
        watchdog.enter(phase, 7)
    header = json.loads(run.rank_file(rank).read_text())
    state = RankState(**{**header, "host": "n1", "pid": pid or 100 + rank, "since": time.time() - 42})
    text = json.dumps(asdict(state)).ljust(511) + "\n"
    run.rank_file(rank).write_text(text + stack)


def nobody_looks(ranks: list[RankState], silent: bool) -> dict[int, Look]:
    raise AssertionError("there is no need to look")


def test_a_killed_worker_is_told_with_its_place(run: RunDir) -> None:
    say(run, 0)
    say(run, 1)
    for errors in ({1: GONE}, {0: ECHO, 1: GONE}):
        assert find_out(run, errors, nobody_looks).line == (
            "rank 1 (host n1, pid 101, in phase training after step 7) was killed, by a signal or for want "
            "of memory"
        )


def test_where_only_the_others_complain_the_processes_are_looked_at(run: RunDir) -> None:
    say(run, 0)
    say(run, 1)
    seen = {0: Look("computing"), 1: Look(None)}
    assert "rank 1 (host n1" in find_out(run, {0: ECHO}, lambda ranks, silent: seen).line
    all_live = {0: Look("computing"), 1: Look("computing")}
    line = find_out(run, {0: ECHO}, lambda ranks, silent: all_live).line
    assert line.startswith("the workers lost touch with each other: RuntimeError: ") and "peer" in line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("Task was killed due to the node running low on memory.", "its node was short of memory"),
        ("The actor died because its node has died. Node Id: 1", "was lost with its node"),
    ],
)
def test_what_ray_says_of_a_death_is_told(run: RunDir, words: str, reason: str) -> None:
    say(run, 0)
    assert reason in find_out(run, {0: RayError(words)}, nobody_looks).line


def test_a_worker_that_died_before_it_said_anything_is_a_number(run: RunDir) -> None:
    assert find_out(run, {2: GONE}, nobody_looks).line.startswith("rank 2 was killed")


def test_a_rank_that_hung_is_told_not_those_that_waited_for_it(run: RunDir) -> None:
    say(run, 0, IN_A_COLLECTIVE)
    say(run, 1, HANGS)
    say(run, 2)
    found = find_out(run, {0: GONE, 2: ECHO}, nobody_looks)
    assert found.line == (
        "rank 1 (host n1, pid 101, in phase training after step 7) made no progress for 10 s "
        "(ray.hang_timeout_s) and was ended"
    )
    assert HANGS in found.stacks and IN_A_COLLECTIVE in found.stacks


def test_where_all_waited_for_each_other_all_are_told(run: RunDir) -> None:
    for rank in range(5):
        say(run, rank, IN_A_COLLECTIVE)
    line = find_out(run, {0: GONE}, nobody_looks).line
    assert all(f"rank {rank} (host n1" in line for rank in range(3)) and ", and 2 other ranks" in line


def test_a_worker_that_does_not_answer_is_told_with_its_state_and_stack(run: RunDir) -> None:
    say(run, 0)
    say(run, 1)

    def look_at(ranks: list[RankState], silent: bool) -> dict[int, Look]:
        assert [state.rank for state in ranks] == [1] and silent
        return {1: Look("stopped by a signal", "in forward")}

    found = find_out(run, {1: WorkerHealthCheckTimeoutError("hanging")}, look_at)
    assert "rank 1 (host n1, pid 101, in phase training after step 7) is stopped by a signal" in found.line
    assert "made no progress for 42 s" in found.line
    assert "in forward" in found.stacks
    away = find_out(run, {1: WorkerHealthCheckTimeoutError("hanging")}, lambda ranks, silent: {})
    assert "is on a node that does not answer" in away.line and not away.stacks


def test_an_error_of_a_worker_is_told_with_its_rank(run: RunDir) -> None:
    assert find_out(run, {0: ECHO, 3: ValueError("shapes differ")}, nobody_looks).line == (
        "rank 3 failed: ValueError: shapes differ"
    )


# -- a process ------------------------------------------------------------------------------------


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[str]]:
    """A process that has stopped itself inside a function."""
    script = "import os, signal\ndef stops_here():\n    os.kill(os.getpid(), signal.SIGSTOP)\nstops_here()"
    process = subprocess.Popen([sys.executable, "-c", script], text=True)
    until = time.monotonic() + 30
    while look(process.pid, silent=False).state != "stopped by a signal":
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait(10)


def test_a_stopped_process_is_killed_once_its_stack_is_read(stopped: subprocess.Popen[str]) -> None:
    found = look(stopped.pid, silent=True)
    assert found.state == "stopped by a signal"
    assert "stops_here" in found.stack or "State:\tT (stopped)" in found.stack  # where py-spy may not read it
    assert stopped.wait(10) == -signal.SIGKILL


def test_without_py_spy_the_kernel_is_asked(
    stopped: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    found = look(stopped.pid, silent=True)
    assert "not installed" in found.stack and "State:\tT (stopped)" in found.stack


def test_a_process_that_is_gone_has_no_state() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    until = time.monotonic() + 30
    while look(child.pid, silent=True) != Look(None):  # a zombie until it is waited for
        assert time.monotonic() < until
        time.sleep(0.05)
    child.wait(10)
    assert look(child.pid, silent=True) == Look(None) and look(os.getpid(), silent=False).state


# -- how often ------------------------------------------------------------------------------------


def test_failures_without_progress_end_a_run_not_its_length() -> None:
    week = Restarts(max_failures=1)
    assert all(week.allows(newest) for newest in (0, 10, 20, 30))  # a checkpoint between each two
    assert not week.allows(30)
    assert (week.made, week.in_a_row) == (4, 2)
    assert week.describe() == (
        "that makes 2 failures without a new checkpoint, and ray.max_failures is 1 (4 restarts in all)"
    )


def test_the_limit_counts_from_the_last_checkpoint_on() -> None:
    restarts = Restarts(max_failures=2)
    assert [restarts.allows(newest) for newest in (4, 4, 8, 8, 8)] == [True, True, True, True, False]
    assert not Restarts(max_failures=0).allows(4)
    endless = Restarts(max_failures=-1)
    assert all(endless.allows(0) for _ in range(50))
