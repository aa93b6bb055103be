"""A run on this machine alone cannot be reached from another one: every port listens on loopback only."""

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nemo_ray.run_dir import RunDir
from tests.train import launch_stub

ROOT = Path(__file__).parents[2]
RAY_OF_A_SWEEP = """
import sys
if sys.argv[1] == "imported before":
    import ray
from nemo_ray import session
environment = session.Environment()
session.start_local(1, environment, include_dashboard=True)
import ray
print(ray.get(ray.remote(lambda: "ready").remote()), flush=True)
input()
session.shutdown()
"""


def open_ports(pid: int) -> tuple[int, list[str]]:
    """How many ports a process and those that it started listen on, and which are not on loopback."""
    count, found = 0, []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for place in process.net_connections(kind="inet"):
                if place.type == socket.SOCK_STREAM and place.status != psutil.CONN_LISTEN:
                    continue
                count += 1
                address = ipaddress.ip_address(place.laddr.ip)
                address = getattr(address, "ipv4_mapped", None) or address
                if not address.is_loopback:
                    found.append(f"{' '.join(process.cmdline())[:60]}: {place.laddr.ip}:{place.laddr.port}")
    return count, found


@contextlib.contextmanager
def started(*command: str) -> Iterator["subprocess.Popen[str]"]:
    """A process with a Ray of its own, which is ended with it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate("\n", timeout=60)
        process.kill()


def until(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.timeout(60)
def test_ports_that_others_reach_are_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        count, found = open_ports(os.getpid())
        assert count
        with socket.create_server(("", 0)) as place:
            assert open_ports(os.getpid())[0] == count + 1
            (line,) = set(open_ports(os.getpid())[1]) - set(found)
            assert line.endswith(f":{place.getsockname()[1]}")


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_a_run_listens_on_loopback_only(tmp_path: Path) -> None:
    """Two workers that train, with all that Ray, Ray Train and torch start for them. One port is left: the
    store of rank 0, which torch (2.13) binds to every interface; SECURITY.md says so."""
    run = RunDir(tmp_path / "run")

    def trains() -> bool:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(run.progress_file.read_text()).get("step", 0) > 3
        return False

    with started(str(launch_stub.__file__), "counts", str(run.path)) as process:
        until(trains, process)
        count, found = open_ports(process.pid)
    assert count > 10 and len(found) == 1 and "TrainWorker" in found[0], found


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", ["by us", "imported before"])
def test_ray_and_its_dashboard_listen_on_loopback_only(case: str) -> None:
    """As a sweep starts it, also from a program that has imported Ray."""
    with started("-c", RAY_OF_A_SWEEP, case) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        count, found = open_ports(process.pid)
    assert count > 5 and not found, found
