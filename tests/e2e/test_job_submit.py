"""`ray job submit` of the quickstart to a head on loopback that the test starts, and ends, itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT
from tests.e2e.compare import assert_each_step_once, train_rows
from tests.e2e.nodes import BIN, Nodes, nodes
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Nodes]:
    """`ray start --head` in the foreground, on loopback only."""
    with nodes(tmp_path, num_cpus=3, alone=True) as made:
        yield made


def test_the_quickstart_as_a_job(world: World, head: Nodes, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    ray = (str(BIN / "ray"), "job")
    job = world.command(
        *(*ray, "submit", f"--address={head.dashboard}", "--submission-id=quickstart", "--working-dir=."),
        *("--", "python", "-m", "nemo_ray.train", "configs/quickstart.yaml", "max_steps=3"),
        *("evals_per_epoch=", "completion_prompts=", f"ray.storage_path={storage}"),
        **head.environment,
    )
    assert job.end() == 0, job.output
    status = world.command(*ray, "status", f"--address={head.dashboard}", "quickstart", **head.environment)
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
