"""What "the same run" means: rows of metrics, and tensors of the result."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_ray.run_dir import RunDir

EXACT = ("step", "cursor", "tokens", "target_tokens", "data_hash")
LOSS_RTOL = 1e-5
TENSOR_TOLERANCE = 1e-3
"""Of a tensor's largest value. A wrong sum or a lost pack moves it by tenths."""


def train_rows(run: RunDir) -> list[dict[str, Any]]:
    """Rows of optimizer steps."""
    return [row for row in run.read_metrics() if "loss" in row]


def eval_rows(run: RunDir) -> list[dict[str, Any]]:
    """Rows of evaluations."""
    return [row for row in run.read_metrics() if "eval_loss" in row]


def assert_loss_falls(run: RunDir, share: float = 0.05) -> None:
    """Without this, equal curves might be equal because nothing is learned."""
    losses = [row["loss"] for row in train_rows(run)]
    assert sum(losses[-2:]) < (1 - share) * sum(losses[:2]), losses
    held_out = [row["eval_loss"] for row in eval_rows(run)]
    assert held_out[-1] < (1 - share) * held_out[0], held_out


def assert_each_step_once(run: RunDir, num_steps: int, eval_steps: list[int]) -> None:
    """In order, without a gap or a row too many."""
    assert [row["step"] for row in train_rows(run)] == list(range(1, num_steps + 1))
    assert Counter(row["step"] for row in eval_rows(run)) == Counter(eval_steps)


def assert_same_rows(rows: list[dict[str, Any]], wanted: list[dict[str, Any]], rtol: float) -> None:
    """Train rows: the same data, and losses within `rtol`."""
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for name in EXACT:
            assert row[name] == other[name], (name, row, other)
        for name, allowed in (("epoch", 1e-9), ("lr", 1e-9), ("loss", rtol), ("grad_norm", 10 * rtol)):
            assert math.isclose(row[name], other[name], rel_tol=allowed, abs_tol=1e-12), (name, row, other)


def assert_same_course(run: RunDir, wanted: RunDir, rtol: float = LOSS_RTOL) -> None:
    """The same metrics from the first row to the last, and the same completions."""
    assert_same_rows(train_rows(run), train_rows(wanted), rtol)
    assert_each_step_once(run, len(train_rows(wanted)), [row["step"] for row in eval_rows(wanted)])
    for row, other in zip(eval_rows(run), eval_rows(wanted), strict=True):
        assert row["step"] == other["step"]
        assert math.isclose(row["eval_loss"], other["eval_loss"], rel_tol=rtol), (row, other)
    assert run.read_completions() == wanted.read_completions()


def largest_differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor, the largest difference as a share of its largest value; names and shapes must agree."""
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return {
        name: float((found[name].float() - other.float()).abs().max() / other.float().abs().max())
        for name, other in wanted.items()
    }


def assert_same_tensors(found: Path, wanted: Path, tolerance: float = TENSOR_TOLERANCE) -> None:
    """Two safetensors files hold the same, up to floating-point noise."""
    off = largest_differences(load_file(found), load_file(wanted))
    worst = max(off, key=lambda name: off[name])
    assert off[worst] <= tolerance, (worst, off[worst])


def assert_same_adapter(run: RunDir, wanted: RunDir, tolerance: float = TENSOR_TOLERANCE) -> None:
    """Two runs ended with the same adapter."""
    name = "adapter_model.safetensors"
    assert_same_tensors(run.adapter_dir / name, wanted.adapter_dir / name, tolerance)
