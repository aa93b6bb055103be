"""The driver with a real Ray and small workers: exit codes, signals, errors, and what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train.driver import this_driver
from nemo_ray.train.driver_lock import BEAT_S, FILE_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
STUB = Path(__file__).with_name("launch_stub.py")
ROOT = Path(__file__).parents[2]


class Started:
    """A launch in a session of its own, so that its processes can be told from all others."""

    def __init__(self, behaviour: str, run: RunDir, *overrides: str, **environment: str) -> None:
        self.log = run.path.parent / "out.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(STUB), behaviour, str(run.path), *overrides],
                env={**clean, "PYTHONPATH": str(ROOT), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < until, self.output
            time.sleep(0.05)

    def ctrl_c(self) -> None:
        """As a terminal sends it: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def launches() -> Iterator[list[Started]]:
    started: list[Started] = []
    yield started
    for launch in started:
        if launch.process.poll() is None:
            launch.process.kill()
            launch.process.wait(10)


def start(launches: list[Started], behaviour: str, run: RunDir, *overrides: str, **env: str) -> Started:
    launches.append(Started(behaviour, run, *overrides, **env))
    return launches[-1]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


@pytest.mark.soak
def test_a_run_to_its_end(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "finish", run)
    assert launch.end() == 0, launch.output
    lines = launch.output.splitlines()
    assert lines[0] == f"output: {run.path}"
    assert "held-out loss  4.0000 before, 3.0000 after step 20 (-25.0%)" in lines
    assert "before  It is before." in lines and "after   It is after." in lines
    assert "model: 1,000 parameters, 10 of them trained (1.00%)" in lines
    assert "Traceback" not in launch.output and "WARNING" not in launch.output and len(lines) < 40
    facts = run.read_run()
    assert (facts["outcome"], facts["world_size"], facts["data_fingerprint"]) == ("finished", 2, "f00d")
    assert facts["model"] == {"total": 1000, "trainable": 10}
    assert {path.name for path in run.path.iterdir() if not path.name.startswith(".")} == {
        *("adapter", "checkpoints", "completions.jsonl", "data_plan.json"),
        *("metrics.jsonl", "progress.json", "run.json"),
    }
    assert start(launches, "finish", run).end() == 2


def test_ctrl_c_saves_a_checkpoint(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "steps", run)
    launch.wait_for("tokens/s")
    launch.ctrl_c()
    began = time.monotonic()
    assert launch.end() == 130
    assert time.monotonic() - began < 10  # 3 s; Ray's cleaner of placement groups alone would wait for 10
    assert "stopping: saving a checkpoint" in launch.output and not errors(launch.output)
    newest = run.newest_checkpoint()
    assert newest is not None and str(newest) in launch.output.splitlines()[-1]
    assert run.read_run()["outcome"] == "stopped" and not run.stop_requested()


@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "deaf", run)
    launch.wait_for("tokens/s")
    launch.ctrl_c()
    launch.wait_for("stopping: saving a checkpoint")
    began = time.monotonic()
    launch.ctrl_c()
    assert launch.end() == 130
    assert time.monotonic() - began < 10


@pytest.mark.long
def test_sigterm_before_training_ends_cleanly(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "steps", run)
    launch.wait_for("starting 2 workers")
    launch.process.terminate()
    assert launch.end(30) == 130
    assert "training had not begun" in launch.output and "Traceback" not in launch.output
    assert not run.holds_run()  # nothing that the next start would have to overwrite


def test_a_workers_error_is_one_line_and_not_tried_again(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "ours", run, "overwrite=true")
    assert launch.end() == 1, launch.output
    assert errors(launch.output) == ["error: the self-test failed: document B moved by 0.5"]
    assert "Traceback" not in launch.output
    assert run.error_file.read_text().count("PatchError: the self-test failed") == 1


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_disk_without_room_is_one_line_and_not_tried_again(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "no room", run)
    assert launch.end() == 1, launch.output
    wanted = "error: /elsewhere/file could not be written: No space left on device; make room there"
    assert errors(launch.output) == [wanted]
    assert "again" not in launch.output and "Traceback" not in launch.output


@pytest.mark.soak
def test_an_unknown_error_is_tried_once_more_and_points_to_its_traceback(
    run: RunDir, launches: list[Started]
) -> None:
    launch = start(launches, "crash", run)
    assert launch.end(90) == 1, launch.output
    place = f"(full traceback: {run.error_file})"
    assert errors(launch.output) == [f"error: ValueError: shapes differ {place}"]
    assert run.error_file.read_text().count("--- worker 0") == 2 and not run.holds_run()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_rank_that_hangs_is_told_with_its_stack_and_replaced(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "hangs", run, "ray.hang_timeout_s=3")
    assert launch.end(240) == 0, launch.output
    told = [line for line in launch.output.splitlines() if "starting again" in line]
    assert len(told) == 1 and not errors(launch.output), launch.output
    assert re.match(r"rank 1 \(host \S+, pid \d+, in phase training after step 3\) made no progress", told[0])
    assert told[0].endswith(f"; its stack is in {run.error_file}: starting again from step-2")
    assert "in hang_once" in run.error_file.read_text()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "behaviour", ["dies when asked", pytest.param("dies at once", marks=pytest.mark.soak)]
)
def test_a_worker_that_dies_before_ray_asks_for_it_is_replaced(
    behaviour: str, run: RunDir, launches: list[Started]
) -> None:
    launch = start(launches, behaviour, run)
    assert launch.end(240) == 0, launch.output
    assert launch.output.count("starting again from the beginning") == 1 and not errors(launch.output)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_failures_without_a_checkpoint_end_the_run(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "dies", run, "ray.max_failures=1")
    assert launch.end(240) == 1, launch.output
    assert (
        launch.output.count("rank 1 was killed, by a signal or for want of memory: starting again from") == 1
    )
    (error,) = errors(launch.output)
    assert "rank 1 was killed" in error and "2 failures without a new checkpoint" in error
    assert "ray.max_failures is 1 (1 restart in all)" in error


@pytest.mark.long
def test_data_that_fails_ends_the_run_after_a_checkpoint(run: RunDir, launches: list[Started]) -> None:
    launch = start(launches, "steps", run, STUB_DATA_FAILS="1")
    assert launch.end() == 1, launch.output
    assert errors(launch.output) == ["error: rows.jsonl: every row was rejected"]
    assert run.newest_checkpoint() is not None


@pytest.mark.soak
def test_a_frozen_driver_that_was_taken_over_writes_nothing_more(
    run: RunDir, launches: list[Started]
) -> None:
    """Neither do its workers, which are not frozen."""
    launch = start(launches, "steps", run)
    launch.wait_for("tokens/s")
    launch.process.send_signal(signal.SIGSTOP)
    taker = replace(this_driver("raysubmit_2"), host="other")
    (run.path / FILE_NAME).write_text(json.dumps(asdict(taker)))
    time.sleep(3 * BEAT_S)
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir() if path != run.ray_dir}
    run.clear_stop()  # as the taker does at its beginning
    time.sleep(2 * BEAT_S)
    launch.process.send_signal(signal.SIGCONT)
    assert launch.end() == 1, launch.output
    (line,) = errors(launch.output)
    assert f"{run.path} was taken over by another driver (process {taker.pid} on other, since" in line
    assert "Traceback" not in launch.output
    del before[run.progress_file]
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir() if path != run.ray_dir} == before
    assert "outcome" not in run.read_run()
