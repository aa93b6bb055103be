"""Two held-out sets, the best weights, an early stop, and what trackers show, by the real command."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_ray.run_dir import RunDir
from nemo_ray.train.trackers.rows import figures
from tests.e2e.command import TRAIN
from tests.e2e.compare import assert_same_adapter, assert_same_course, eval_rows, train_rows
from tests.e2e.world import ASSETS, World, first_lines, write_lines
from tests.train.tracker_readers import Points, mlflow_points, tensorboard_points, wandb_points

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


def settings(world: World) -> dict[str, Any]:
    """Few rows, learned by heart: the held-out losses fall, then rise."""
    few = write_lines(world.folder / "few.jsonl", first_lines(world.chats, 4))
    texts = write_lines(world.folder / "held-out-texts.jsonl", first_lines(ASSETS / "text.jsonl", 3))
    return {
        "datasets": [{"path": str(few)}],
        "test_datasets": [{"path": str(world.held_out)}, {"path": str(texts), "type": "completion"}],
        "sequence_len": 128,
        "micro_batch_size": 2,
        "learning_rate": 0.03,
        "warmup_steps": 0,
        "max_steps": 16,
        "eval_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss/held-out",
        "early_stopping_patience": 2,
        "wandb_project": "nemotron",
        "wandb_mode": "offline",
        "mlflow_tracking_uri": mlflow_uri(world),
        "mlflow_experiment_name": "nemotron",
    }


def mlflow_uri(world: World) -> str:
    return f"file://{world.folder}/mlflow"


@pytest.fixture(scope="module", autouse=True)
def store_of_files() -> Iterator[None]:
    """MLflow's own server is no part of mlflow-skinny; its store of files has to be asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield


@pytest.fixture(scope="module")
def stopped(world: World) -> RunDir:
    return world.finished("stopped-early", **settings(world))


def losses(run: RunDir) -> dict[int, float]:
    rows = eval_rows(run)
    return {row["step"]: row["eval_datasets"]["held-out"]["loss"] for row in rows if row["step"]}


def test_the_best_weights_of_a_run_that_stopped_early(world: World, stopped: RunDir) -> None:
    found = losses(stopped)
    best, last = min(found, key=lambda step: found[step]), max(found)
    assert last == best + 4 < 16 and train_rows(stopped)[-1]["step"] == last
    facts = stopped.read_run()
    assert (facts["outcome"], facts["exported_step"]) == ("finished", best)
    assert facts["best"] == {"metric": "eval_loss/held-out", "value": found[best], "step": best}
    assert facts["stopped_early"] == {"step": last, "evaluations_without_improvement": 2}
    assert stopped.checkpoint_steps() == [best, last]
    after = [row for row in stopped.read_completions() if row["stage"] == "after"]
    assert [row["step"] for row in after] == [best]
    output = world.output_of("stopped-early")
    assert f"at step {last}: 2 evaluations in a row brought nothing better" in output
    assert f"eval_loss/held-out {found[best]:.4f} at step {best}; its weights are the result" in output
    first = eval_rows(stopped)[0]
    parts = ", ".join(f"{name} {own['loss']:.4f}" for name, own in first["eval_datasets"].items())
    assert f"held-out loss {first['eval_loss']:.4f} at step 0 ({parts})" in output


def test_the_adapter_is_that_of_the_best_checkpoint(stopped: RunDir) -> None:
    folder = stopped.checkpoint_dir(stopped.read_run()["best"]["step"])
    saved = load_file(folder / "rank-0.safetensors")
    adapter = load_file(stopped.adapter_dir / "adapter_model.safetensors")
    names = [name for name in saved if name.endswith("in_proj.lora_B")]
    assert names
    for name in names:
        layer = name.split("layers.")[1].split(".")[0]
        (wanted,) = [value for key, value in adapter.items() if f"layers.{layer}.mixer.in_proj.lora_B" in key]
        assert torch.equal(saved[name], wanted) and wanted.any()


def tracked_points(world: World, run: RunDir) -> dict[str, Points]:
    """What each tracker shows of a run."""
    ids = run.read_trackers()
    files = sorted(run.wandb_dir.glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{ids['wandb_run_id']}.wandb"}
    return {
        "TensorBoard": tensorboard_points(run.tensorboard_dir),
        "W&B": wandb_points(files[-1]),
        "MLflow": mlflow_points(mlflow_uri(world), ids["mlflow_run_id"]),
    }


def test_trackers_show_metrics_jsonl(world: World, stopped: RunDir) -> None:
    wanted = {
        (name, row["step"]): value for row in stopped.read_metrics() for name, value in figures(row).items()
    }
    assert ("eval_loss/held-out-texts", 2) in wanted and ("train/loss", 1) in wanted
    for tracker, points in tracked_points(world, stopped).items():
        assert points.keys() == wanted.keys(), tracker
        for key, value in wanted.items():
            assert len(points[key]) == 1, (tracker, key)
            assert math.isclose(points[key][0], value, rel_tol=1e-5, abs_tol=1e-30), (tracker, key)
    assert stopped.read_run()["notices"] == []


@pytest.mark.soak
def test_killed_and_resumed_stops_at_the_same_step(world: World, stopped: RunDir) -> None:
    """SIGKILL between the best evaluation and the stop."""
    best = stopped.read_run()["best"]["step"]
    name, changes = "killed-before-the-stop", settings(world)
    run, started = world.run_dir(name), world.train(name, **changes)
    started.wait_until(lambda: any(row["step"] == best + 2 for row in eval_rows(run)))
    started.kill_tree()
    assert "outcome" not in run.read_run() and best in run.checkpoint_steps()
    again = world.train(name, "resume_from_checkpoint=auto", **changes)
    assert again.end() == 0, again.output
    assert_same_course(run, stopped)
    assert_same_adapter(run, stopped, tolerance=1e-5)
    for key in ("exported_step", "stopped_early"):
        assert run.read_run()[key] == stopped.read_run()[key]
    wanted = {(name, row["step"]) for row in run.read_metrics() for name in figures(row)}
    for tracker, points in tracked_points(world, run).items():
        assert points.keys() == wanted and all(len(values) == 1 for values in points.values()), tracker
    assert len(list(run.wandb_dir.glob("offline-run-*"))) >= 2  # one for each start of the worker


def test_a_metric_that_is_not_evaluated_is_refused(world: World) -> None:
    changes = {**settings(world), "metric_for_best_model": "eval_loss/texts"}
    config = world.write_yaml(output_dir=str(world.run_dir("no-such-metric").path), **changes)
    started = world.command(*TRAIN, str(config))
    assert started.end() == 2
    (line,) = started.errors
    assert "eval_loss/held-out-texts" in line and not world.run_dir("no-such-metric").path.exists()
