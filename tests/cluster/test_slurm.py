"""The sbatch script: shellcheck, and the script itself with a Slurm of shell scripts and real Ray nodes.

The `srun` here starts what it is given on this machine, a Ray node at the loopback address of its host name.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT, Command
from tests.e2e.compare import assert_each_step_once, train_rows
from tests.e2e.world import World

SCRIPT = ROOT / "cluster" / "slurm" / "nemo_ray.sbatch"
SCONTROL = """\
#!/usr/bin/env bash
[[ $* == "show hostnames node-[1-2]" ]] && printf 'node-1\\nnode-2\\n'
"""
HOSTNAME = """\
#!/usr/bin/env bash
[[ $* == -I ]] && echo '127.0.0.1 ::1 '
"""
SRUN = """\
#!/usr/bin/env bash
set -euo pipefail
[[ -z ${{FAILS:-}} ]] || {{ echo 'srun: error: no such node' >&2; exit 1; }}
echo "$*" >> '{calls}'
host=1
while [[ $1 == --* ]]; do
  [[ $1 == --nodelist=node-* ]] && host=${{1#--nodelist=node-}}
  shift
done
if [[ "$1 $2" == "ray start" ]]; then
  ports=({ports})
  own=("${{ports[@]:3 * (host - 1)}}") # Ray's defaults are one node's, and may be taken
  set -- "$@" --node-ip-address="127.0.0.$host" --object-store-memory=268435456 \\
    --dashboard-agent-listen-port="${{own[0]}}" --runtime-env-agent-port="${{own[1]}}" \\
    --metrics-export-port="${{own[2]}}"
  [[ $host != 1 ]] || set -- "$@" --ray-client-server-port="${{ports[6]}}" --dashboard-port="${{ports[7]}}"
fi
exec "$@"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny base and rows of the whole runs."""
    return World(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator["Job"]:
    made = Job(tmp_path)
    yield made
    made.end()


class Job:
    """A job of two nodes with 2 CPUs each."""

    def __init__(self, folder: Path) -> None:
        self._folder, bin_folder = folder, folder / "bin"
        bin_folder.mkdir()
        self.calls, self.commands = folder / "calls", list[Command]()
        srun = SRUN.format(calls=self.calls, ports=" ".join(map(str, free_ports(range(7100, 9900), 8))))
        for name, text in (("srun", srun), ("scontrol", SCONTROL), ("hostname", HOSTNAME)):
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        (head_port,) = free_ports(range(20000, 30000), 1)
        self.id = 7_000_000 + head_port - 20000
        self.temp_dir = Path(f"/tmp/ray-{self.id}")
        self.run = RunDir(folder / "run")

    def start(self, config: Path, *overrides: str, **environment: str) -> Command:
        """As `sbatch` does it: the script alone, in the folder that it was submitted from."""
        self.commands.append(
            Command(
                ["bash", str(SCRIPT), str(config), f"output_dir={self.run.path}", *overrides],
                self._folder / "job.log",
                PATH=f"{self._folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                NEMO_RAY_VENV=str(Path(sys.executable).parents[1]),
                SLURM_JOB_ID=str(self.id),
                SLURM_JOB_NODELIST="node-[1-2]",
                SLURM_CPUS_PER_TASK="2",
                SLURM_SUBMIT_DIR=str(ROOT),
                **environment,
            )
        )
        return self.commands[-1]

    def end(self) -> None:
        """End what is left."""
        for command in self.commands:
            command.kill_tree()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def free_ports(numbers: range, count: int) -> list[int]:
    """Ports that nothing listens on, others each time."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(numbers)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None and os.environ.get("CI") != "true":
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_it_is_used_by_sbatch_with_a_configuration(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for arguments in ([], ["run.yaml"]):
        refused = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 2 and refused.stderr.startswith("error: usage: sbatch"), refused.stderr


def test_a_node_that_does_not_start_ends_the_job(job: Job) -> None:
    started = job.start(Path("run.yaml"), FAILS="yes")
    assert started.end(60) == 1, started.output
    assert "error: the head ended" in started.output and started.leaves_nothing_behind()


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_run(world: World, job: Job) -> None:
    started = job.start(two_workers(world, max_steps=3))
    assert started.end(150) == 0, started.output
    assert started.leaves_nothing_behind(), started.tree()
    assert_each_step_once(job.run, 3, [0, 3])
    assert "node 127.0.0.2" in started.output, "the doctor looked at both"
    calls = job.calls.read_text().splitlines()
    assert ["--head" in call for call in calls[:2]] == [True, False] and "--nodelist=node-2" in calls[1]
    assert calls[2].endswith(f"rm -rf {job.temp_dir}") and not job.temp_dir.exists()
    assert "RAY_AUTH_TOKEN" not in started.output + job.calls.read_text()


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_stopped_job_saves_and_ends(world: World, job: Job) -> None:
    started = job.start(two_workers(world, max_steps=2000, save_steps=2000))
    started.wait_until(lambda: job.run.metrics_file.exists() and len(train_rows(job.run)) >= 2, 120)
    os.kill(started.process.pid, signal.SIGUSR1)  # to the script alone, as before a time limit
    assert started.end(60) == 130, started.output
    assert started.leaves_nothing_behind(), started.tree()
    assert job.run.checkpoint_steps() and "saving a checkpoint" in started.output


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("script_told", ["first", "last"])
def test_a_cancelled_job_leaves_nothing(world: World, job: Job, script_told: str) -> None:
    """Slurm tells the script and every process of every step, in any order, and kills what is left after
    30 s."""
    started = job.start(two_workers(world, max_steps=2000))
    started.wait_until(
        lambda: "this machine" in started.output, 60
    )  # the nodes are there: the doctor's first lines
    if script_told == "first":
        started.process.terminate()
    for pid in set(started.tree()) - {started.process.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if script_told == "last":
        started.wait_until(lambda: "error" in started.output or started.process.poll() is not None, 20)
        started.process.terminate()
    assert started.end(30) == 130, started.output
    assert "error" not in started.output
    assert started.leaves_nothing_behind(), started.tree()


def two_workers(world: World, **changes: Any) -> Path:
    """A configuration that needs both nodes."""
    ray = {"num_workers": 2, "resources_per_worker": {"CPU": 1.5}}
    return world.write_yaml(micro_batch_size=2, ray=ray, eval_steps=3, completion_prompts=[], **changes)
