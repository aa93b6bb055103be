"""Preparation whose processes are killed, through the command: it goes on where it was, and loses nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.data.sources import plan_data
from tests.data.helpers import chats, prepare_all, write_lines
from tests.data.test_pipeline import write_config

WITHIN_S = 90.0


def start(config: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "nemo_ray.data", str(config)]
    with open(log, "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def data_processes(ancestor: int) -> list[int]:
    """Ids of the processes below `ancestor` that run a data task now."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue

    def below(process: int) -> bool:
        return process == ancestor or (process in parents and below(parents[process]))

    return [
        pid
        for pid, title in titles.items()
        if title.startswith(b"ray::") and b"prepare_row" in title and below(pid)
    ]


@pytest.mark.e2e
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_killed_processes_cost_no_shard_that_was_there(base: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", chats(6000, words=6))
    prepared = tmp_path / "prepared"
    config = write_config(tmp_path, base, dataset_prepared_path=str(prepared), sequence_len=64)

    def shards() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in prepared.glob("*.arrow")}

    command = start(config, tmp_path / "first.log")
    until(lambda: len(shards()) >= 3, command)
    command.kill()
    command.wait(30)
    kept: dict[str, int] = {}
    while shards() != kept:  # the tasks end with Ray, a moment later
        kept = shards()
        time.sleep(1.0)
    data = load_config(str(config), []).config.data
    alone = plan_data(data, str(base), str(tmp_path / "alone"))
    assert 3 <= len(kept) < len(alone.windows), (tmp_path / "first.log").read_text()

    command = start(config, tmp_path / "second.log")
    found: list[int] = []

    def working() -> bool:
        found[:] = data_processes(command.pid)
        return bool(found) and len(shards()) > len(kept)

    until(working, command)
    os.kill(found[0], signal.SIGKILL)
    assert command.wait(WITHIN_S) == 0, (tmp_path / "second.log").read_text()
    now = shards()
    assert {name: now[name] for name in kept} == kept
    prepare_all(alone, data, base)
    assert {path.name: path.read_bytes() for path in prepared.glob("*.arrow")} == {
        path.name: path.read_bytes() for path in Path(alone.directory).glob("*.arrow")
    }
