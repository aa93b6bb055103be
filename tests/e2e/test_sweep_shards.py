"""A sweep split over two clusters, as two submitted jobs, and brought together by the merge command."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.tune import read_result
from nemo_ray.tune.sweep_dir import SweepDir
from tests.e2e.command import TUNE
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.nodes import BIN, Nodes, nodes
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(1500)]

TUNE_SECTION = {
    "parameters": {"learning_rate": [1e-5, 1e-2, 1e-4]},
    "search": "grid",
    "scheduler": "none",
    "max_concurrent": 1,
}


@pytest.fixture
def heads(tmp_path: Path) -> Iterator[list[Nodes]]:
    """Two clusters that know nothing of each other."""
    folders = [tmp_path / "one", tmp_path / "two"]
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        yield [stack.enter_context(nodes(folder, 3, alone=True)) for folder in folders]


def test_two_clusters_train_what_one_would(
    world: World, reference: RunDir, heads: list[Nodes], tmp_path: Path
) -> None:
    jobs, parts = [], []
    for number, head in enumerate(heads, 1):
        part = world.run_dir(f"sweep-part-{number}").path
        config = world.write_yaml(output_dir=str(part), tune=TUNE_SECTION, ray={"num_workers": 1})
        submit = (str(BIN / "ray"), "job", "submit", f"--address={head.dashboard}", "--working-dir=.", "--")
        command = (*submit, "python", *TUNE[1:], str(config), f"--shard={number}/2")
        jobs.append(world.command(*command, **head.environment))
        parts.append(part)
    for job in jobs:
        assert job.end(900) == 0, job.output
        assert "Traceback" not in job.output, job.output
    assert "2 of 3 (part 1/2)" in jobs[0].output and "1 of 3 (part 2/2)" in jobs[1].output
    whole = tmp_path / "whole"
    merged = world.command(*TUNE, "merge", *map(str, parts), "--output", str(whole))
    assert merged.end(120) == 0, merged.output
    assert "3 of 3 have ended, in 2 parts" in merged.output
    result = read_result(whole)
    assert [trial.number for trial in result.trials] == [0, 1, 2] and result.best is not None
    assert result.best.number == 1, "the one with the reference's learning rate"
    own = SweepDir(parts[1]).trial(1)
    assert_same_course(own, reference)
    assert_same_adapter(own, reference)
    trained = (own.adapter_dir / "adapter_model.safetensors").read_bytes()
    assert (result.path / "best" / "adapter_model.safetensors").read_bytes() == trained
    check = (*TUNE[:1], "-m", "nemo_ray.export", str(result.path / "best"), "--check")
    checked = world.command(*check)
    assert checked.end(300) == 0, checked.output
