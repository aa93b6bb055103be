"""Trials of a population: a run ends at an evaluation and goes on exactly, also from another's weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.train.worker import run_worker
from nemo_ray.tune.sweep_dir import take_over
from tests.e2e.compare import assert_same_adapter, assert_same_course, eval_rows, train_rows
from tests.group import group_of_one
from tests.train.runs import CPU, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("pauses"))


def part(runs: Runs, name: str, pause_after: int | None, **changes: Any) -> tuple[RunDir, dict[str, Any]]:
    """The run `name`, begun or continued, up to an evaluation; and what its worker returned."""
    spec = replace(
        runs.spec(name, resume_from_checkpoint="auto", save_total_limit=1, **changes), pause_after=pause_after
    )
    with group_of_one():
        ended = run_worker(spec, CPU, lambda figures: None)
    return RunDir(spec.output_dir), ended


def test_a_run_in_parts_is_the_whole_run(runs: Runs) -> None:
    whole = runs.run("whole")
    for evaluation, step in ((1, 2), (2, 4), (2, 4)):
        run, ended = part(runs, "parts", evaluation)
        assert ended == {"step": step, "stopped": True} and run.checkpoint_steps() == [step]
        assert eval_rows(run)[-1]["step"] == step and not run.adapter_dir.exists()
    run, ended = part(runs, "parts", 3)
    assert ended == {"step": 6, "stopped": False}, "the last evaluation is the end"
    assert_same_course(run, whole)
    assert_same_adapter(run, whole)


def test_a_run_goes_on_from_anothers_weights_with_its_own_values(runs: Runs) -> None:
    good, _ = part(runs, "good", 1, learning_rate=1e-2)
    bad, _ = part(runs, "bad", 1, learning_rate=1e-5)
    take_over(bad, good, 2)
    part(runs, "good", None, learning_rate=5e-3)
    part(runs, "bad", None, learning_rate=5e-3)
    assert_same_adapter(bad, good)
    mine, others = train_rows(bad), train_rows(good)
    assert mine[0]["lr"] != others[0]["lr"] and [row["loss"] for row in mine[2:]] == [
        row["loss"] for row in others[2:]
    ]
    assert [row["step"] for row in mine] == list(range(1, 7)), "what was before is its own"


def test_pauses_are_evaluations_of_held_out_rows_by_epochs_too(runs: Runs) -> None:
    settings = {"max_steps": None, "num_epochs": 0.5, "eval_steps": None, "evals_per_epoch": 4}
    run, ended = part(runs, "epochs", 1, **settings)
    paused_at = ended["step"]
    assert ended["stopped"] and eval_rows(run)[-1]["step"] == paused_at > 0
    run, ended = part(runs, "epochs", 2, **settings)
    assert not ended["stopped"] and ended["step"] > paused_at
