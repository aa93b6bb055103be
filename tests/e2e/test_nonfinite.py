"""Rows that make the loss infinite, through the command: a step is left out, or the run ends in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.data.sources import plan_data
from nemo_ray.run_dir import RunDir
from nemo_ray.train.worker import WorkerSpec
from tests.data.helpers import prepare_all
from tests.e2e.compare import train_rows
from tests.e2e.test_bad_input import refused
from tests.e2e.world import World
from tests.train.poison import lonely_token, packs_by_step, poisoned

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

SHORT: dict[str, Any] = {"max_steps": 6, "eval_steps": None, "save_steps": None, "completion_prompts": []}
PACK = 1  # of two workers' packs, one of the second's


@pytest.fixture(scope="module")
def clean(world: World) -> WorkerSpec:
    """What reads the packs of these runs, prepared."""
    config = load_config(str(world.write_yaml(**SHORT))).config
    plan = plan_data(config.data, config.base_model, config.dataset_prepared_path or "")
    prepare_all(plan, config.data, config.base_model)
    return WorkerSpec(config, plan, "")


def batch(run: RunDir, step: int, num_workers: int) -> list[dict[str, Any]]:
    """What the workers wrote of a step, in the order of the packs."""
    files = [run.nonfinite_dir / f"step-{step}-rank-{rank}.json" for rank in range(num_workers)]
    packs = [json.loads(file.read_text())["packs"] for file in files]
    return [pack for of_all in zip(*packs, strict=True) for pack in of_all]


def assert_holds(pack: dict[str, Any], token: int) -> None:
    """The pack has the token, in a document whose row is named."""
    assert token in pack["input_ids"] and len(pack["rows"]) == len(pack["lengths"])
    (row,) = (
        row
        for row, start, length in zip(pack["rows"], _starts(pack["lengths"]), pack["lengths"], strict=True)
        if token in pack["input_ids"][start : start + length]
    )
    assert row["row"] < len(Path(row["file"]).read_text().splitlines())


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


@pytest.mark.soak
def test_too_many_in_a_row_end_the_run(world: World, clean: WorkerSpec) -> None:
    tokens = {step: lonely_token(clean, step, PACK) for step in (2, 3, 4)}
    base = poisoned(world.base, world.folder / "base-three-bad", *tokens.values())
    run = world.run_dir("three-bad")
    started = world.train("three-bad", base_model=str(base), **SHORT)
    words = ("max_nonfinite_steps: 3: step 4 has no finite loss and no finite gradient", "learning_rate")
    refused(started, 1, *words, str(run.nonfinite_dir), str(run.checkpoint_dir(4)))
    assert started.output.count("note: step 2 has no finite loss and no finite gradient: it was skipped") == 1
    assert "note: step 3" not in started.output and "a worker was lost" not in started.output
    assert [(row["step"], row["loss"] is None, row["nonfinite_steps"]) for row in train_rows(run)] == [
        (1, False, 0),
        (2, True, 1),
        (3, True, 2),
        (4, True, 3),
    ]
    assert run.error_file.read_text().count("--- worker") == 1  # it was not tried again
    assert run.checkpoint_steps() == [4] and run.read_run()["outcome"] == "failed"
    assert json.loads((run.checkpoint_dir(4) / "state.json").read_text())["nonfinite_steps"] == 3
    for step, token in tokens.items():
        packs = batch(run, step, 1)
        expected = [pack.input_ids[: pack.num_tokens].tolist() for pack in packs_by_step(clean)[step - 1]]
        assert [pack["input_ids"] for pack in packs] == expected
        assert_holds(packs[PACK], token)


def test_a_bad_row_of_one_worker_costs_one_step(world: World, clean: WorkerSpec) -> None:
    token = lonely_token(clean, 3, PACK)
    base = poisoned(world.base, world.folder / "base-one-bad", token)
    workers = {"micro_batch_size": 2, "ray": {"num_workers": 2}}
    run = world.finished("one-bad", base_model=str(base), **{**SHORT, **workers})
    rows = train_rows(run)
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["step"] for row in rows if row["loss"] is None] == [3]
    output = world.output_of("one-bad")
    assert output.count("note: step 3 has no finite loss and no finite gradient: it was skipped") == 1
    assert re.search(rf"^skipped +1 step without .*; batches in {run.nonfinite_dir}$", output, re.MULTILINE)
    assert_holds(batch(run, 3, 2)[PACK], token)
    assert run.adapter_dir.is_dir() and run.read_run()["outcome"] == "finished"
