"""Several checkpoints of one run on a GPU, by way of pinned memory: each is what trained."""

import math
from pathlib import Path

import pytest
import torch

from nemo_ray.run_dir import RunDir
from nemo_ray.train.worker import run_worker
from tests.e2e.compare import train_rows
from tests.group import group_of_one
from tests.train.runs import Runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])
def test_a_run_goes_on_from_each(graphs: bool, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings = {"save_steps": 2, "test_datasets": [], "eval_steps": None, "cuda_graphs": graphs}

    def run(name: str, **changes: object) -> RunDir:
        spec = runs.spec(name, **settings, **changes)
        with group_of_one():
            run_worker(spec, GPU, lambda figures: None)
        return RunDir(spec.output_dir)

    whole = run("whole")
    assert whole.checkpoint_steps() == [2, 4, 6]
    losses = {row["step"]: row["loss"] for row in train_rows(whole)}
    for step in (2, 4):
        rest = run(f"from-{step}", resume_from_checkpoint=str(whole.checkpoint_dir(step)))
        for row in train_rows(rest):
            assert row["step"] > step and math.isclose(row["loss"], losses[row["step"]], rel_tol=1e-3), row
