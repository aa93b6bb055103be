"""Two drivers on one output_dir: real processes that hold it, die, stand still, and race for it."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.errors import ConfigError, NemoRayError
from nemo_ray.run_dir import RunDir
from nemo_ray.train import driver_lock
from nemo_ray.train.driver import Driver, this_driver
from nemo_ray.train.driver_lock import FILE_NAME, DriverLock
from nemo_ray.train.launch import Launch, Parts
from tests.train.launch_stub import write_inputs

LIMIT_S = 60.0
BEAT_S, WATCH_S = 0.2, 1.0
ELSEWHERE = {"host": "other", "pid_space": "another boot/1"}
HOLDER = """
import sys, time
from pathlib import Path
from nemo_ray.train.driver_lock import DriverLock
DriverLock(Path(sys.argv[1]), sys.argv[2], print, beat_s=0.2).claim()
print("held", flush=True)
time.sleep(600)
"""
State = dict[str, tuple[int, int]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run"


@pytest.fixture
def locks(folder: Path) -> Iterator[Callable[..., DriverLock]]:
    """Makes locks of this process on the folder; they are released in the end."""
    made: list[DriverLock] = []

    def make(said: list[str] | None = None) -> DriverLock:
        say = (lambda text: None) if said is None else said.append
        made.append(DriverLock(folder, None, say, BEAT_S, WATCH_S))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, as the driver of the job `raysubmit_1`."""
    arguments = [sys.executable, "-c", HOLDER, str(folder), "raysubmit_1"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_S)


def state(folder: Path) -> State:
    """Names, times and sizes of all that is there, the folder included."""
    found = {path: path.stat() for path in (folder, *folder.rglob("*")) if path.name != FILE_NAME}
    return {str(path): (status.st_mtime_ns, status.st_size) for path, status in found.items()}


def read(folder: Path) -> Driver:
    return Driver(**json.loads((folder / FILE_NAME).read_bytes()))


def write(folder: Path, driver: Driver) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(asdict(driver)))


def dead() -> Driver:
    """A driver of this machine whose process has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(LIMIT_S)
    return replace(this_driver(None), pid=process.pid)


def assert_refused(lock: DriverLock, holder: Driver) -> str:
    """In one line that names the holder, and without a trace."""
    before = state(lock.folder)
    with pytest.raises(ConfigError) as refusal:
        lock.claim()
    lock.release()
    assert state(lock.folder) == before and read(lock.folder) == holder
    line = str(refusal.value)
    assert "\n" not in line and line.startswith(f"output_dir: another driver is at work in {lock.folder}")
    assert f"process {holder.pid} on {holder.host}, since {holder.started_at}" in line
    return line


def beating(folder: Path, ended: threading.Event) -> threading.Thread:
    """The heartbeat of a driver elsewhere, whose clock is an hour late."""

    def beat() -> None:
        late_ns = time.time_ns() - 3600 * 10**9
        while not ended.wait(BEAT_S):
            late_ns += 10**6
            os.utime(folder / FILE_NAME, ns=(late_ns, late_ns))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    return thread


# -- a holder on this machine ---------------------------------------------------------------------


def test_a_live_holder_is_named_and_nothing_changes(
    folder: Path, locks: Callable[..., DriverLock], holder: subprocess.Popen[str]
) -> None:
    said: list[str] = []
    line = assert_refused(locks(said), read(folder))
    assert f"process {holder.pid} on " in line and "(submission raysubmit_1)" in line
    assert said == []  # the process can be seen: nothing to wait for


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_holder_is_taken_over_at_once(
    folder: Path, locks: Callable[..., DriverLock], holder: subprocess.Popen[str], reaped: bool
) -> None:
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    said: list[str] = []
    lock = locks(said)
    lock.claim()
    assert lock.holds() and said == [] and os.listdir(folder) == [FILE_NAME]


def test_a_stopped_holder_is_alive(
    folder: Path, locks: Callable[..., DriverLock], holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    time.sleep(2 * WATCH_S)
    assert_refused(locks(), read(folder))


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(
    folder: Path, locks: Callable[..., DriverLock], holder: subprocess.Popen[str]
) -> None:
    write(folder, replace(read(folder), process_start=read(folder).process_start - 1, token="before"))
    lock = locks()
    lock.claim()
    assert lock.holds()


# -- a holder elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_elsewhere_lives_while_its_file_moves(
    folder: Path, locks: Callable[..., DriverLock], alive: bool
) -> None:
    """Whatever its process number means here, and whatever its clock says."""
    elsewhere = replace(this_driver("raysubmit_2"), **ELSEWHERE)
    write(folder, elsewhere)
    ended = threading.Event()
    said: list[str] = []
    thread = beating(folder, ended) if alive else None
    began_s = time.monotonic()
    if thread is not None:
        assert_refused(locks(said), elsewhere)
        ended.set()
        thread.join(LIMIT_S)
        assert time.monotonic() - began_s < WATCH_S  # the first beat tells
    else:
        lock = locks(said)
        lock.claim()
        assert lock.holds() and time.monotonic() - began_s >= 0.9 * WATCH_S
    (line,) = said
    assert line.startswith("waiting to see whether another driver is alive") and "on other" in line


def test_a_holder_elsewhere_that_ends_meanwhile_leaves_the_folder_free(
    folder: Path, locks: Callable[..., DriverLock]
) -> None:
    write(folder, replace(this_driver(None), **ELSEWHERE))
    threading.Timer(WATCH_S / 2, (folder / FILE_NAME).unlink).start()
    lock = locks()
    lock.claim()
    assert lock.holds()


def test_a_file_that_cannot_be_read_is_judged_by_its_heartbeat(
    folder: Path, locks: Callable[..., DriverLock]
) -> None:
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(b"")
    ended = threading.Event()
    thread = beating(folder, ended)
    with pytest.raises(ConfigError, match="another driver"):
        locks().claim()
    ended.set()
    thread.join(LIMIT_S)
    lock = locks()
    lock.claim()
    assert lock.holds()


# -- one at a time --------------------------------------------------------------------------------


def race(rounds: list[Path], barrier: Barrier, wins: Any) -> None:
    locks = [DriverLock(folder, None, lambda text: None) for folder in rounds]
    for lock in locks:
        barrier.wait(LIMIT_S)
        try:
            lock.claim()
        except ConfigError:
            continue
        wins.put((lock.folder.name, lock.me.token))
    barrier.wait(LIMIT_S)  # all are alive until the last is done


@pytest.mark.parametrize("before", ["free", "dead", "dead-taker"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_several_takers_exactly_one_wins(
    tmp_path: Path, before: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rounds, num_takers = 150, 3
    rounds = [tmp_path / f"{number}" for number in range(num_rounds)]
    gone = dead()
    for folder in rounds:
        if before != "free":
            write(folder, gone)
        if before == "dead-taker":  # it was killed while it took over
            turn = replace(gone, token="taker")
            (folder / f".driver-{gone.token}.json").write_text(json.dumps(asdict(turn)))
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(num_takers), context.Queue()
    takers = [context.Process(target=race, args=(rounds, barrier, wins)) for _ in range(num_takers)]
    for taker in takers:
        taker.start()
    won = [wins.get(timeout=LIMIT_S) for _ in range(num_rounds)]
    for taker in takers:
        taker.join(LIMIT_S)
        assert taker.exitcode == 0
    assert wins.empty() and sorted(name for name, _ in won) == sorted(folder.name for folder in rounds)
    for name, token in won:
        assert read(tmp_path / name).token == token and os.listdir(tmp_path / name) == [FILE_NAME]


def no_links(source: Any, target: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_taker_that_comes_late_does_not_take_from_the_one_before(
    folder: Path, locks: Callable[..., DriverLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw that the holder is dead, and the first has taken over when the second goes on."""
    write(folder, dead())
    first, late = locks(), locks()
    judge = driver_lock.process_lives

    def judge_then_sleep(driver: Driver) -> bool | None:
        verdict = judge(driver)
        if not first.holds():
            monkeypatch.setattr(driver_lock, "process_lives", judge)
            first.claim()
        return verdict

    monkeypatch.setattr(driver_lock, "process_lives", judge_then_sleep)
    assert judge(read(folder)) is False
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        late.claim()
    assert first.holds() and not late.holds() and os.listdir(folder) == [FILE_NAME]


# -- kept, lost, given up -------------------------------------------------------------------------


def test_the_holder_touches_its_file_and_nothing_else(folder: Path, locks: Callable[..., DriverLock]) -> None:
    lock = locks()
    lock.claim()
    before, status = state(folder), lock.path.stat()
    until = time.monotonic() + LIMIT_S
    while lock.path.stat().st_mtime_ns == status.st_mtime_ns:
        assert time.monotonic() < until
        time.sleep(BEAT_S)
    assert state(folder) == before and lock.path.stat().st_ino == status.st_ino


def test_a_lock_that_another_took_is_noticed_and_left_alone(
    folder: Path, locks: Callable[..., DriverLock]
) -> None:
    lock = locks()
    lock.claim()
    lock.check()
    other = replace(this_driver(None), **ELSEWHERE)
    write(folder, other)
    with pytest.raises(NemoRayError, match="taken over by another driver .* on other, since"):
        lock.check()
    changed_ns = lock.path.stat().st_mtime_ns
    time.sleep(3 * BEAT_S)
    assert lock.path.stat().st_mtime_ns == changed_ns  # else the other would seem alive for ever
    lock.release()
    assert read(folder) == other
    lock.path.unlink()
    with pytest.raises(NemoRayError, match="is gone"):
        lock.check()


def test_release_removes_what_the_claim_made(tmp_path: Path, locks: Callable[..., DriverLock]) -> None:
    lock = locks()
    lock.claim()
    assert lock.holds()
    lock.release()
    assert os.listdir(tmp_path) == []
    lock = locks()
    lock.claim()
    (lock.folder / "run.json").write_text("{}")
    lock.release()
    assert os.listdir(lock.folder) == ["run.json"]


def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    folder: Path, locks: Callable[..., DriverLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        lock = locks()
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); make room"):
            lock.claim()
        lock.release()
    assert not folder.parent.exists()
    folder.parent.write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        locks().claim()


def test_a_file_as_output_dir_is_refused(folder: Path, locks: Callable[..., DriverLock]) -> None:
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        locks().claim()


def test_a_worker_ends_when_its_driver_no_longer_holds_the_folder(
    folder: Path, locks: Callable[..., DriverLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "BEAT_S", BEAT_S)
    lock = locks()
    lock.claim()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(folder, lock.me))
    worker.start()
    worker.join(5 * BEAT_S)
    assert worker.is_alive()
    write(folder, replace(this_driver(None), **ELSEWHERE))
    worker.join(LIMIT_S)
    assert worker.exitcode == 1
    with pytest.raises(NemoRayError, match="taken over"), driver_lock.only_while_held(folder, lock.me):
        raise AssertionError("entered")


def work(folder: Path, driver: Driver) -> None:
    with driver_lock.only_while_held(folder, driver):
        time.sleep(2 * LIMIT_S)


# -- the command, up to Ray -----------------------------------------------------------------------


def never(*_: Any) -> Any:
    raise AssertionError("called")


@pytest.mark.parametrize("override", ["overwrite=true", "resume_from_checkpoint=auto", "max_steps=5"])
def test_a_second_command_is_refused_in_one_line(
    folder: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    run = RunDir(folder)
    run.write_run({})
    run.append_metrics({"step": 1, "loss": 1.0})
    before = state(folder)
    loaded = load_config(str(write_inputs(folder.parent / "inputs")), [f"output_dir={folder}", override])
    assert Launch(loaded, Parts(plan=never, prepare=never, worker=never)).run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: output_dir: another driver") and f"process {holder.pid} on " in line
    assert state(folder) == before and holder.poll() is None


def test_a_driver_that_was_taken_for_dead_begins_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between its claim and its beginning, when it would have cleared the folder."""
    run = RunDir(folder)
    run.write_run({"mine": True})
    run.append_metrics({"step": 1, "loss": 1.0})
    loaded = load_config(
        str(write_inputs(folder.parent / "inputs")), [f"output_dir={folder}", "overwrite=true"]
    )
    other = replace(this_driver("raysubmit_3"), **ELSEWHERE)
    launch = Launch(loaded, Parts(plan=lambda *_: None, prepare=never, worker=never))  # type: ignore[arg-type]
    monkeypatch.setattr("nemo_ray.train.launch.check_metric", lambda *_: None)
    monkeypatch.setattr(launch, "_enter_ray", lambda *_: (write(folder, other), None))
    before = state(folder)
    assert launch.run() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: output_dir: ") and "(submission raysubmit_3)" in line
    assert state(folder)[str(run.metrics_file)] == before[str(run.metrics_file)]
    assert run.read_run() == {"mine": True} and read(folder) == other
