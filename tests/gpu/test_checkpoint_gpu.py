"""Several checkpoints of one run on a GPU, by way of pinned memory: each is what trained."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nemo_ray.config.schema import TrainSection
from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint import Checkpointer, TrainState, load_checkpoint
from nemo_ray.train.optim import AdamW
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


def test_training_goes_on_while_the_gpu_copies(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.begin_attempt()

    def make(value: float) -> tuple[dict[str, nn.Parameter], AdamW]:
        weight = nn.Parameter(torch.full((2**26,), value, device=GPU))
        optimizer = AdamW({"w": weight}, TrainSection())
        optimizer.start_states()
        return {"w": weight}, optimizer

    with group_of_one():
        parameters, optimizer = make(1.0)
        checkpointer = Checkpointer(run, parameters, optimizer, None)
        for step in (1, 2, 3):
            checkpointer.start(TrainState(step=step))
            made = checkpointer._copies._made
            assert step == 1 or (made is not None and not made.query()), "nobody waited for the copies"
            checkpointer.hold_changes()
            with torch.no_grad():
                parameters["w"].fill_(step + 1.0)
                optimizer.state[parameters["w"]]["exp_avg"].fill_(step + 1.0)
            checkpointer.wait()
        for step in (1, 2, 3):
            found, states = make(0.0)
            load_checkpoint(run.checkpoint_dir(step), found, states)
            assert bool((found["w"] == step).all())
            assert bool((states.state[found["w"]]["exp_avg"] == (step if step > 1 else 0)).all())
