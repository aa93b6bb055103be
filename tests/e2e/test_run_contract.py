"""The run directory as other tools read it: names and fields, of a real run."""

import json
import math
import re
from pathlib import Path

import pytest

from nemo_ray.config.schema import Config
from nemo_ray.run_dir import RunDir
from tests.e2e.compare import assert_each_step_once, eval_rows, train_rows
from tests.e2e.world import NUM_STEPS, PACKS_PER_STEP, World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EVAL_FIELDS = ["step", "eval_loss", "eval_tokens", "eval_s", "eval_datasets"]
TRAIN_FIELDS = [
    "step",
    "epoch",
    "cursor",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "target_tokens",
    "tokens_per_s",
    "step_s",
    "data_wait_s",
    "checkpoint_s",
    "peak_memory_bytes",
    "mfu",
    "expert_max_violation",
    "data_hash",
    "nonfinite_steps",
]


def test_metrics(reference: RunDir) -> None:
    lines = [json.loads(line) for line in reference.metrics_file.read_text().splitlines()]
    assert lines == reference.read_metrics()
    assert list(lines[0]) == list(lines[-1]) == EVAL_FIELDS
    assert_each_step_once(reference, NUM_STEPS, [0, 6, NUM_STEPS])
    for row in eval_rows(reference):
        assert list(row) == EVAL_FIELDS and row["eval_s"] > 0
        own = {"loss": row["eval_loss"], "tokens": row["eval_tokens"]}
        assert row["eval_datasets"] == {"held-out": own}
    previous = {"epoch": 0.0, "cursor": 0}
    for row in train_rows(reference):
        assert list(row) == TRAIN_FIELDS
        assert row["epoch"] > previous["epoch"]
        assert 0 < row["cursor"] - previous["cursor"] <= PACKS_PER_STEP
        assert 0 < row["target_tokens"] < row["tokens"] <= PACKS_PER_STEP * 256
        assert math.isclose(row["tokens_per_s"], row["tokens"] / row["step_s"], rel_tol=1e-9)
        after_a_checkpoint = row["step"] > 1 and row["step"] % 4 == 1  # save_steps
        assert row["checkpoint_s"] > 0 if after_a_checkpoint else row["checkpoint_s"] == 0
        assert row["mfu"] is None and 0 < row["expert_max_violation"] < 8  # 8 experts
        assert 0 <= row["data_wait_s"] <= row["step_s"] and row["peak_memory_bytes"] > 50e6
        previous = row
    # No step crosses an epoch; the last one of the first takes what is left.
    assert any(row["epoch"] == 1.0 for row in train_rows(reference)) and previous["epoch"] > 1.0
    assert len({row["data_hash"] for row in train_rows(reference)}) == NUM_STEPS


def test_run_json(world: World, reference: RunDir) -> None:
    facts = json.loads(reference.run_json.read_text())
    config = Config.model_validate(facts["config"])
    assert config.base_model == str(world.base) and config.max_steps == NUM_STEPS
    assert {"python", "nemo_ray", "ray", "torch", "transformers", "peft"} <= facts["versions"].keys()
    assert all(facts["versions"].values())
    revision = facts["git_revision"]  # None where the sources are no git checkout
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", revision)
    assert re.fullmatch(r"[0-9a-f]{8,}", facts["data_fingerprint"])
    assert (facts["world_size"], facts["outcome"], facts["submission_id"]) == (1, "finished", None)
    assert facts["exported_step"] == NUM_STEPS and facts["stopped_early"] is None
    assert facts["best"]["metric"] == "eval_loss" and facts["best"]["step"] in (6, NUM_STEPS)
    assert 0 < facts["model"]["trainable"] < facts["model"]["total"]


def names(folder: Path) -> set[str]:
    """Without those that begin with a dot, which are not part of the contract."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_files(reference: RunDir) -> None:
    assert names(reference.path) == {
        *("adapter", "checkpoints", "completions.jsonl", "data_plan.json", "rejected.jsonl"),
        *("metrics.jsonl", "progress.json", "run.json", "tensorboard"),
    }
    assert names(reference.checkpoints_dir) == {"step-4", "step-8", "step-12"}
    assert names(reference.checkpoint_dir(12)) == {"state.json", "tensors.json", "rank-0.safetensors"}
    assert len(reference.complete_checkpoints()) == 3
    found = {path.name for path in reference.adapter_dir.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= found
    rows = reference.read_completions()
    assert [(row["stage"], row["step"]) for row in rows] == [("before", 0), ("after", NUM_STEPS)]
    assert all(row.keys() == {"prompt", "completion", "stage", "step"} for row in rows)
    assert reference.read_progress()["phase"] == "done"
