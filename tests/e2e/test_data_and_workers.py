"""Preparing beside training, and before it where the workers take all CPUs. Real runs, real shards."""

import sys
from pathlib import Path

import pytest

from nemo_ray.data.manifest import DataPlan
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import read_json
from tests.e2e.command import Command
from tests.e2e.compare import train_rows
from tests.e2e.world import ASSETS, World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

# As a cluster whose CPUs the workers take: a local Ray always has one more.
NO_CPU_TO_SPARE = """
import sys
from nemo_ray.train import resources
resources.local_cpus = lambda wanted: int(wanted.worker_cpus)
from nemo_ray.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def shards(folder: Path) -> list[Path]:
    return list(folder.glob("*.arrow"))


def test_training_starts_with_the_first_shards(world: World) -> None:
    rows = world.folder / "many.jsonl"
    rows.write_bytes((ASSETS / "chats.jsonl").read_bytes() * 30)
    run, prepared = world.run_dir("beside"), world.folder / "prepared-beside"
    changes = {"dataset_prepared_path": str(prepared), "test_datasets": [], "max_steps": 100_000}
    started = world.train("beside", datasets=[{"path": str(rows)}], **changes)
    started.wait_until(lambda: train_rows(run))
    ready, windows = len(shards(prepared)), world_windows(run)
    assert 0 < ready < windows, f"{ready} of {windows} windows were prepared at the first step"
    started.wait_until(lambda: len(shards(prepared)) > ready)
    before = train_rows(run)[-1]["step"]
    started.wait_until(lambda: train_rows(run)[-1]["step"] > before)
    started.ctrl_c()
    assert started.end(60) == 130, started.output
    assert not started.errors and started.leaves_nothing_behind(), started.output


def world_windows(run: RunDir) -> int:
    """Windows that the run's data plan has."""
    plan = DataPlan.from_json(read_json(run.data_plan_file))
    return len(plan.windows) + len(plan.eval_windows)


@pytest.mark.soak
def test_without_a_cpu_to_spare_preparing_finishes_first(world: World) -> None:
    run, prepared = world.run_dir("before"), world.folder / "prepared-before"
    config = world.write_yaml(
        output_dir=str(run.path), dataset_prepared_path=str(prepared), max_steps=2, sequence_len=128
    )
    started: Command = world.command(sys.executable, "-c", NO_CPU_TO_SPARE, str(config))
    started.wait_until(lambda: "starting 1 worker" in started.output)
    assert len(shards(prepared)) == world_windows(run) > 1, "a worker starts when all shards are there"
    assert "note: the workers take all CPUs, so all data is prepared before they start" in started.output
    assert started.end() == 0, started.output
    assert len(train_rows(run)) == 2 and started.leaves_nothing_behind(), started.tree()
