"""Choosing the best evaluation, stopping for want of a better one, and keeping its checkpoint."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.manifest import DataPlan, SourceInfo
from nemo_ray.data.window_list import Window, WindowList
from nemo_ray.errors import ConfigError, DataError
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import read_json
from nemo_ray.train import outputs, summary
from nemo_ray.train.best import Best, best_of, check_metric, eval_names, metric_of, steps_to_delete
from tests.e2e.compare import EXACT, eval_rows, train_rows
from tests.e2e.world import first_lines, write_lines
from tests.train.runs import KilledError, Runs

Rows = list[dict[str, Any]]


def section(**keys: Any) -> TrainSection:
    return TrainSection.model_validate(keys)


def rows_of(*losses: float) -> Rows:
    """Evaluations every 2 steps, from 0 on."""
    return [{"step": 2 * index, "eval_loss": loss} for index, loss in enumerate(losses)]


# -- the rules -------------------------------------------------------------------------------------


def test_the_lowest_loss_after_step_0_is_the_best() -> None:
    best = best_of(rows_of(1.0, 5.0, 4.0, 4.0, math.nan, 4.5), section(), 100)
    assert (best.step, best.value, best.misses) == (4, 4.0, 3)
    assert best.facts() == {"metric": "eval_loss", "value": 4.0, "step": 4}
    nothing = best_of(rows_of(1.0, math.nan), section(), 100)
    assert (nothing.step, nothing.misses, nothing.facts()) == (None, 1, None)


@pytest.mark.parametrize(
    ("losses", "keys", "stops_at"),
    [
        ((9, 5, 4, 3, 2), {}, None),
        ((9, 5, 6, 6, 1), {}, 6),
        ((9, 5, 6, 4, 6, 6), {}, 10),
        ((1, 5, 6, 6), {}, 6),  # the evaluation before training is no measure
        ((9, 5, 4.9, 4.8), {"early_stopping_threshold": 0.3}, 6),
        # As in transformers: the best loss is updated by any improvement, patience by a large one only.
        ((9, 5, 4.9, 4.6, 4.5, 4.4), {"early_stopping_threshold": 0.2}, 10),
        ((9, 5, math.nan, math.nan), {}, 6),
    ],
)
def test_patience(losses: tuple[float, ...], keys: dict[str, Any], stops_at: int | None) -> None:
    best = Best(section(early_stopping_patience=2, **keys))
    stopped = None
    for row in rows_of(*losses):
        best.add(row)
        if best.patience_is_over and stopped is None:
            stopped = row["step"]
    assert stopped == stops_at
    without = best_of(rows_of(*losses), section(**keys), 100)
    assert not without.patience_is_over


@given(st.lists(st.floats(0, 10) | st.just(math.nan), max_size=12), st.integers(0, 12), st.floats(0, 1))
def test_a_continued_run_knows_what_the_uninterrupted_one_knows(
    losses: list[float], cut: int, threshold: float
) -> None:
    train = section(early_stopping_patience=2, early_stopping_threshold=threshold)
    rows = rows_of(*losses)
    whole = best_of(rows, train, 100)
    continued = best_of(rows, train, 2 * cut)
    for row in rows[cut + 1 :]:
        continued.add(row)
    assert vars(continued) == vars(whole)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=10, unique=True).map(sorted),
    st.integers(1, 6),
    st.data(),
)
def test_the_best_and_the_newest_checkpoint_stay(steps: list[int], keep: int, data: st.DataObject) -> None:
    best = data.draw(st.sampled_from([None, 99, *steps]))
    gone = steps_to_delete(steps, keep, best)
    left = [step for step in steps if step not in gone]
    needed = {steps[-1], *([best] if best in steps else [])}
    assert needed <= set(left)
    assert len(left) == min(len(steps), max(keep, len(needed)))
    others = [step for step in steps if step not in needed]
    assert gone == others[: len(gone)]  # the oldest


def plan_of(*names: str) -> DataPlan:
    sources = tuple(SourceInfo(name, "completion", (), 1, 1, 1, 1.0, True) for name in names)
    windows = WindowList(Window(index, (), 1, str(index)) for index in range(len(names)))
    return DataPlan("", "f00d", 8, WindowList(), windows, sources, (), 0)


def test_names_of_datasets_are_short_unique_and_stable() -> None:
    paths = (
        "/a/chats.jsonl",
        "/b/chats.jsonl train[:20%]",
        "/b/chats.jsonl.gz",
        "org/My set",
        "/c/*.parquet",
    )
    names = list(eval_names(plan_of(*paths)).values())
    assert names == ["chats", "chats-train-20", "chats-2", "My-set", "c"]
    assert list(eval_names(plan_of(*paths, "/d/more.json")).values())[:5] == names
    awkward = list(
        eval_names(plan_of("/a/x-2.jsonl", "/a/x.jsonl", "/b/x.jsonl", "/c/x.jsonl", "///")).values()
    )
    assert awkward == ["x-2", "x", "x-3", "x-4", "data"]


def test_a_metric_of_a_dataset_that_is_not_evaluated_is_refused() -> None:
    plan = plan_of("/a/chats.jsonl", "/a/texts.jsonl")
    check_metric(section(metric_for_best_model="eval_loss/texts"), plan)
    with pytest.raises(ConfigError, match=r"^metric_for_best_model: eval_loss/text is .*eval_loss/texts$"):
        check_metric(section(metric_for_best_model="eval_loss/text"), plan)
    row = {"eval_loss": 1.0, "eval_datasets": {"texts": {"loss": None, "tokens": 0}}}
    with pytest.raises(DataError, match="metric_for_best_model"):
        metric_of(row, "eval_loss/texts")


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Runs(tmp_path_factory.mktemp("best"))
    write_lines(made.train, first_lines(made.train, 4))  # few rows, learned by heart
    yield made
    torch.set_num_threads(threads)


OVERFITS: dict[str, Any] = {
    "learning_rate": 0.03,
    "lr_scheduler": "constant",
    "max_steps": 16,
    "lora_target_linear": True,
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "save_total_limit": 2,
}


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> RunDir:
    """A run that gets better, then worse, and stops."""
    return runs.run("stopped", **OVERFITS)


def losses_by_step(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in eval_rows(run)}


def assert_exported(run: RunDir, step: int) -> None:
    """The adapter has the tensors of the checkpoint of `step`, and of no other one."""
    adapter = load_file(run.adapter_dir / "adapter_model.safetensors")
    name, found = next((k, v) for k, v in adapter.items() if "q_proj.lora_B" in k)
    for other in run.checkpoint_steps():
        folder = run.checkpoint_dir(other)
        index = read_json(folder / "tensors.json")
        key = next(key for key in index if key.endswith("q_proj.lora_B"))
        # Each worker's file holds its rows.
        tensor = torch.cat([load_file(folder / part["file"])[key] for part in index[key]["parts"]])
        assert torch.equal(tensor, found) == (other == step), (name, other)


def test_the_run_stops_and_the_best_weights_are_the_result(stopped: RunDir) -> None:
    losses = losses_by_step(stopped)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    last = max(losses)
    assert 2 <= best < last < 16 and last == best + 4  # patience 2, an evaluation every 2 steps
    assert [row["step"] for row in train_rows(stopped)] == list(range(1, last + 1))
    assert stopped.checkpoint_steps() == [best, last]  # without save_steps: improvements and the end
    facts = stopped.read_run()
    assert facts["exported_step"] == best
    assert facts["best"] == {"metric": "eval_loss", "value": losses[best], "step": best}
    assert facts["stopped_early"] == {"step": last, "evaluations_without_improvement": 2}
    assert_exported(stopped, best)
    rows = dict(summary.result_rows(stopped, 1.0))
    assert rows["best"].endswith(f"at step {best}; its weights are the result")
    assert rows["stopped early"].startswith(f"at step {last}: 2 evaluations in a row")


@pytest.mark.parametrize("after", [0, 2], ids=["at-the-best", "after-it"])
def test_killed_and_resumed_stops_at_the_same_step(runs: Runs, stopped: RunDir, after: int) -> None:
    best = stopped.read_run()["best"]["step"]
    name = f"killed-{after}"
    with pytest.raises(KilledError):
        runs.run(name, die_at_evaluation=best + after, save_steps=3, **OVERFITS)
    newest = runs.folder / "runs" / name
    assert RunDir(newest).checkpoint_steps()[-1] < best + 4
    run = runs.run(name, save_steps=3, resume_from_checkpoint="auto", **OVERFITS)
    assert losses_by_step(run) == losses_by_step(stopped)
    for row, other in zip(train_rows(run), train_rows(stopped), strict=True):
        assert all(row[field] == other[field] for field in (*EXACT, "loss"))
    for field in ("exported_step", "best", "stopped_early"):
        assert run.read_run()[field] == stopped.read_run()[field]
    assert_exported(run, best)
    assert best in run.checkpoint_steps() and len(run.checkpoint_steps()) == 2


def test_resuming_a_run_that_stopped_changes_nothing(runs: Runs, stopped: RunDir) -> None:
    before = stopped.read_metrics(), load_file(stopped.adapter_dir / "adapter_model.safetensors")
    run = runs.run("stopped", resume_from_checkpoint="auto", **OVERFITS)
    assert run.read_metrics() == before[0]
    after = load_file(run.adapter_dir / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before[1].items())


def test_patience_that_is_over_at_the_last_step_stops_nothing(runs: Runs, stopped: RunDir) -> None:
    """Neither by steps nor, with two steps in an epoch, by epochs."""
    last = stopped.read_run()["stopped_early"]["step"]
    for name, length in (
        ("steps", {"max_steps": last}),
        ("epochs", {"max_steps": None, "num_epochs": last / 2}),
    ):
        run = runs.run(f"ends-anyway-by-{name}", **{**OVERFITS, **length})
        assert losses_by_step(run) == losses_by_step(stopped)
        facts = run.read_run()
        assert facts["stopped_early"] is None and facts["best"] == stopped.read_run()["best"]


@pytest.mark.soak
def test_two_workers_stop_together(runs: Runs, stopped: RunDir) -> None:
    run = runs.run_in_two("two", **{**OVERFITS, "micro_batch_size": 1})
    assert list(losses_by_step(run)) == list(losses_by_step(stopped))
    assert run.read_run()["exported_step"] == stopped.read_run()["exported_step"]
    assert_exported(run, run.read_run()["exported_step"])


def test_by_the_loss_of_one_dataset(runs: Runs) -> None:
    metric = "eval_loss/texts"
    run = runs.run("by-texts", **{**OVERFITS, "metric_for_best_model": metric})
    losses = {row["step"]: row["eval_datasets"]["texts"]["loss"] for row in eval_rows(run) if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert run.read_run()["best"] == {"metric": metric, "value": losses[best], "step": best}


def test_without_the_keys_the_last_weights_are_the_result(runs: Runs) -> None:
    run = runs.run("plain", save_total_limit=1, save_steps=2)
    facts = run.read_run()
    assert facts["exported_step"] == 6 and facts["stopped_early"] is None
    assert run.checkpoint_steps() == [6]
    assert_exported(run, 6)


def test_held_out_rows_without_a_target_cannot_be_chosen_by(runs: Runs) -> None:
    path = write_lines(runs.folder / "long.jsonl", ['{"text": "' + "word " * 500 + '"}'])
    keys = {"excess_length_strategy": "drop", "test_datasets": [{"path": str(path), "type": "completion"}]}
    with pytest.raises(DataError, match="^val_set_size, test_datasets: no held-out row has a target"):
        runs.run("no-target", **{**OVERFITS, **keys})


def test_a_best_checkpoint_that_was_not_kept_is_told_before_the_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for row in rows_of(9.0, 5.0, 6.0, 4.0):
        run.append_metrics(row)
    for step in (4, 6):
        run.checkpoint_dir(step).mkdir(parents=True)
        (run.checkpoint_dir(step) / "state.json").write_text("{}")
    wants = section(load_best_model_at_end=True)
    outputs.check_best(run, wants, run.checkpoint_dir(6))
    outputs.check_best(run, section(), run.checkpoint_dir(4))
    with pytest.raises(ConfigError, match="^load_best_model_at_end: true, but .* step-4, at step 2, has no"):
        outputs.check_best(run, wants, run.checkpoint_dir(4))
