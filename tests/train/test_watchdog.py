"""A rank that makes no progress ends itself with its stack; one that is slow is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train.watchdog import SLOW_FACTOR, WAIT_S, RankState, Watchdog, collective_timeout_s, read_rank

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1.0
_SCRIPT = """
import ctypes, sys, threading, time
from pathlib import Path
from nemo_ray.train.watchdog import Watchdog

def hangs_in_c():
    ctypes.PyDLL(None).sleep(60)  # with the interpreter's lock held

def hangs_in_python():
    while True:
        pass

def waits():
    watchdog.wait()
    time.sleep(3)

def saves():
    watchdog.enter("saving", 6)
    time.sleep(3)

def goes_on_slowly():
    for step in range(6):
        watchdog.enter("training", step)
        watchdog.wait()
        watchdog.work()
        time.sleep(0.6)

def ends():
    pass

with Watchdog(Path(sys.argv[1]), 3, float(sys.argv[3])) as watchdog:
    watchdog.enter("training", 6)
    watchdog.work()
    work = threading.Thread(target=globals()[sys.argv[2]])
    work.start()
    work.join()
time.sleep(2 * float(sys.argv[3]))  # nobody watches any more
print("came to its end")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return RunDir(tmp_path / "run").rank_file(3)


def run(file: Path, behaviour: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _SCRIPT, str(file), behaviour, str(timeout_s)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize("behaviour", ["hangs_in_c", "hangs_in_python"])
def test_a_rank_that_hangs_ends_itself_and_leaves_its_stack(file: Path, behaviour: str) -> None:
    began_s = time.monotonic()
    done = run(file, behaviour)
    assert done.returncode == 1 and "came to its end" not in done.stdout, done.stderr
    assert time.monotonic() - began_s < 30
    told = read_rank(file)
    assert told is not None
    state, stack = told
    assert (state.rank, state.phase, state.step, state.limit_s) == (3, "training", 6, TIMEOUT_S)
    assert f"in {behaviour}" in stack and "most recent call first" in stack
    assert abs(time.time() - state.since) < 60


@pytest.mark.parametrize("behaviour", ["goes_on_slowly", "waits", "saves", "ends"])
def test_a_rank_that_makes_progress_or_may_take_long_is_left_alone(file: Path, behaviour: str) -> None:
    done = run(file, behaviour)
    assert done.returncode == 0 and "came to its end" in done.stdout, done.stderr
    told = read_rank(file)
    assert told is not None and told[1] == ""


def test_without_a_limit_nothing_strikes(file: Path) -> None:
    assert run(file, "waits", timeout_s=0).returncode == 0
    assert read_rank(file) is not None


def test_each_phase_has_its_limit(file: Path) -> None:
    found = {}
    with Watchdog(file, 0, 100.0) as watchdog:
        for phase in ("training", "evaluating", "loading", "saving", "exporting", "done", "downloading a/b"):
            watchdog.enter(phase, 1)
            found[phase] = limit(file)
        watchdog.wait()
        assert limit(file) == 100.0 + WAIT_S
        watchdog.work()
        assert limit(file) == 100.0
    slow = 100.0 * SLOW_FACTOR
    assert list(found.values()) == [100.0, 100.0, slow, slow, slow, 0, 0]


def test_who_waits_for_another_gives_up_last() -> None:
    for timeout_s in (1.0, 600.0, 7200.0):
        longest_s = max(timeout_s + WAIT_S, timeout_s * SLOW_FACTOR)
        assert collective_timeout_s(timeout_s) > longest_s
    assert collective_timeout_s(0) == 1800


def limit(file: Path) -> float:
    told = read_rank(file)
    assert told is not None and isinstance(told[0], RankState)
    return told[0].limit_s
