"""`ray job submit` of the quickstart to a head on loopback that the test starts, and ends, itself."""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT, Command
from tests.e2e.compare import assert_each_step_once, train_rows
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# The commands that a user types are those of this environment, also where it is not activated.
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
TOKEN = secrets.token_hex(32)
ENVIRONMENT = {
    "PATH": PATH,
    "RAY_AUTH_MODE": "token",  # a token of its own: Ray would keep one in the user's home
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray 2.60 listens on loopback only with this
}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range of workers' and clients' ports."""
    found: list[int] = []
    for port in range(7100 + os.getpid() % 500, 9900):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class Head:
    """A running head. `dashboard`: where jobs are submitted to."""

    command: Command
    dashboard: str


def answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """`ray start --head` in the foreground, on loopback only."""
    short = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # paths of sockets are limited to 107 characters
    gcs, dashboard, client, agent, runtime, metrics = free_ports(6)
    command = Command(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--runtime-env-agent-port={runtime}"),
            *(f"--metrics-export-port={metrics}", f"--temp-dir={short}"),
            *("--num-cpus=3", "--object-store-memory=268435456"),
        ],
        tmp_path / "head.log",
        **ENVIRONMENT,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        command.wait_until(lambda: answers(f"{address}/api/jobs/"), 120)
        yield Head(command, address)
    finally:
        command.kill_tree()
        shutil.rmtree(short, ignore_errors=True)


def test_the_quickstart_as_a_job(world: World, head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    ray = (str(BIN / "ray"), "job")
    job = world.command(
        *(*ray, "submit", f"--address={head.dashboard}", "--submission-id=quickstart", "--working-dir=."),
        *("--", "python", "-m", "nemo_ray.train", "configs/quickstart.yaml", "max_steps=3"),
        *("evals_per_epoch=", "completion_prompts=", f"ray.storage_path={storage}"),
        **ENVIRONMENT,
    )
    assert job.end() == 0, job.output
    status = world.command(*ray, "status", f"--address={head.dashboard}", "quickstart", **ENVIRONMENT)
    assert status.end(60) == 0 and "succeeded" in status.output, status.output

    run = RunDir(storage / "outputs" / "quickstart")
    told = job.output.splitlines()
    lines = [line for line in told if line.startswith("output: ")]
    assert lines == [f"output: {run.path}"] and "Traceback" not in job.output, job.output
    facts = run.read_run()
    assert (facts["outcome"], facts["submission_id"], facts["world_size"]) == ("finished", "quickstart", 2)
    assert facts["config"]["base_model"] == "nemo_ray/demo/assets/base"  # in the job's own copy
    assert_each_step_once(run, 3, [0, 3])
    assert all(row["tokens"] > 3000 and row["loss"] > 1 for row in train_rows(run))
    assert run.newest_checkpoint() == run.checkpoint_dir(3)
    assert (run.adapter_dir / "adapter_model.safetensors").stat().st_size > 500_000
    assert (run.prepared_dir).is_dir() and not (ROOT / "storage").exists()
