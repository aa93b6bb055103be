"""A profile of steps on a GPU says where their time went, and the steps around it are timed as they are."""

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


def test_a_profile_by_kind_of_kernel(tmp_path: Path) -> None:
    spec = Runs(tmp_path).spec(
        "run", test_datasets=[], eval_steps=None, profiler_steps=2, profiler_steps_start=2
    )
    with group_of_one():
        run_worker(spec, torch.device("cuda"), lambda figures: None)
    run = RunDir(spec.output_dir)
    facts = run.read_run()["profile"]
    assert (facts["first_step"], facts["steps"]) == (3, 2)
    assert facts["class_ms"]["matmul"] > 0 and facts["class_ms"]["scan and conv"] > 0
    assert facts["class_ms"]["communication"] == facts["communication_alone_ms"] == 0
    assert 0 < facts["busy_ms"] < facts["step_ms"] and run.profile_file.stat().st_size > 1000
    assert all(1e-4 < row["step_s"] < 60 for row in train_rows(run)), "none is counted twice, or not at all"
