"""`nemo-ray submit` to a head on loopback: a run, the same name again, and the code of a refused job."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import Command
from tests.e2e.compare import assert_each_step_once
from tests.e2e.nodes import BIN, Nodes, nodes
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Nodes]:
    with nodes(tmp_path, num_cpus=3, alone=True) as made:
        yield made


def test_a_job_by_name(world: World, head: Nodes, tmp_path: Path) -> None:
    storage = tmp_path / "storage"

    def submit(*more: str) -> Command:
        keys = ("evals_per_epoch=", "completion_prompts=", f"ray.storage_path={storage}", "max_steps=3")
        return world.command(
            *(str(BIN / "nemo-ray"), "submit", "configs/quickstart.yaml", *keys),
            *(f"--address={head.dashboard}", "--env=A_SECRET", *more),
            **head.environment,
            A_SECRET="not to be seen",
        )

    first = submit("--id=first")
    assert first.end() == 0, first.output
    run = RunDir(storage / "outputs" / "quickstart")
    assert run.read_run()["submission_id"] == "first"
    assert_each_step_once(run, 3, [0, 3])
    lines = first.output.splitlines()
    assert f"output: {run.path}" in lines and lines[-1] == "job first ended with 0", first.output
    assert lines.count(f"output: {run.path}") == 1, "the log comes once"

    again = submit("--id=first")
    assert again.end() == 0, again.output
    assert "resumes   " in again.output and run.read_run()["submission_id"] == "first-2"
    assert_each_step_once(run, 3, [0, 3])

    refused = submit("--id=other")
    assert refused.end() == 2, refused.output
    assert "already holds a run" in refused.output
    for job in (first, again, refused):
        assert "not to be seen" not in job.output and "Traceback" not in job.output
        assert ".ray_pkg" not in job.output and "WebSocket" not in job.output
