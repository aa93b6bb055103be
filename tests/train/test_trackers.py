"""Trackers show what metrics.jsonl says, each point once, also after a resume; and never stop a run."""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ray.config.schema import TrackingSection
from nemo_ray.errors import ConfigError
from nemo_ray.run_dir import RunDir
from nemo_ray.train.trackers import setup
from nemo_ray.train.trackers.forwarder import Forwarder
from nemo_ray.train.trackers.rows import Row, figures, flat, without_secrets
from nemo_ray.train.trackers.setup import check_trackers, variables_to_pass_on
from nemo_ray.train.trackers.tensorboard import TensorBoard
from nemo_ray.train.worker import run_worker
from tests.e2e.compare import eval_rows, train_rows
from tests.group import group_of_one
from tests.train.runs import CPU, KilledError, Runs
from tests.train.tracker_readers import (
    Points,
    mlflow_points,
    tensorboard_points,
    tensorboard_texts,
    wandb_config,
    wandb_group,
    wandb_points,
)

# -- what is sent ----------------------------------------------------------------------------------


def test_rows_as_figures() -> None:
    assert figures({"step": 3, "loss": 1.5, "data_hash": "ff"}) == {"train/loss": 1.5}
    assert figures({"step": 3, "loss": None, "lr": 1e-4}) == {"train/lr": 1e-4}
    datasets = {"chats": {"loss": 2.0, "tokens": 7}, "none": {"loss": None, "tokens": 0}}
    row = {"step": 3, "eval_loss": 2.0, "eval_tokens": 7, "eval_s": 0.1, "eval_datasets": datasets}
    assert figures(row) == {
        **{"eval/loss": 2.0, "eval/tokens": 7, "eval/s": 0.1},
        **{"eval_loss/chats": 2.0, "eval_tokens/chats": 7, "eval_tokens/none": 0},
    }


def test_secrets_are_taken_out_of_urls_wherever_they_are() -> None:
    value = {
        "mlflow_tracking_uri": "https://me:hunter2@host:5000/path",
        "datasets": [{"path": "s3://AKIA:hunter2@bucket/rows.jsonl"}],
        "path": "https://host/rows.parquet?X-Amz-Signature=hunter2&x=1 and more",
        "prompts": ("What is a@b?", 3, None),
    }
    clean = without_secrets(value)
    assert "hunter2" not in json.dumps(clean) and "AKIA" not in json.dumps(clean)
    assert clean["mlflow_tracking_uri"] == "https://host:5000/path"
    assert clean["path"] == "https://host/rows.parquet and more"
    assert clean["prompts"] == ["What is a@b?", 3, None]
    assert dict(flat(clean))["datasets.0.path"] == "s3://bucket/rows.jsonl"


# -- threads ---------------------------------------------------------------------------------------


class Recorder:
    """A tracker that fails or takes its time, as told."""

    name = "Recorder"

    def __init__(self, failures: int = 0, wait: threading.Event | None = None) -> None:
        self.failures, self.wait = failures, wait
        self.rows: list[Row] = []
        self.outcome: str | None = None

    def open(self) -> None:
        if self.wait is not None:
            self.wait.wait(20)

    def log(self, rows: Sequence[Row]) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("https://me:hunter2@host is not reachable")
        self.rows += rows

    def flush(self) -> None:
        pass

    def close(self, outcome: str) -> None:
        self.outcome = outcome


def test_a_tracker_that_hangs_holds_nothing_up() -> None:
    release = threading.Event()
    tracker = Recorder(wait=release)
    forwarder = Forwarder(tracker)
    began_s = time.monotonic()
    for step in range(1000):
        forwarder.put({"step": step})
    forwarder.flush(0.05)
    forwarder.end("finished")
    assert not forwarder.ended_within(0.05) and time.monotonic() - began_s < 1.0
    release.set()
    assert forwarder.ended_within(10)
    assert [row["step"] for row in tracker.rows] == list(range(1000)) and tracker.outcome == "finished"


def test_a_tracker_that_fails_is_told_once_and_tried_again() -> None:
    tracker = Recorder(failures=3)
    forwarder = Forwarder(tracker, retry_s=0.01)
    forwarder.put({"step": 1})
    until_s = time.monotonic() + 10
    while tracker.failures and time.monotonic() < until_s:
        time.sleep(0.01)
    forwarder.put({"step": 2})
    error = forwarder.take_error()
    assert error is not None and "not reachable" in error and "hunter2" not in error
    assert forwarder.take_error() is None
    forwarder.end("stopped")
    assert forwarder.ended_within(10)
    assert [row["step"] for row in tracker.rows] == [1, 2] and tracker.outcome == "stopped"


def test_a_tracker_that_fails_for_good_ends_with_the_run() -> None:
    tracker = Recorder(failures=10**6)
    forwarder = Forwarder(tracker, retry_s=1000)
    forwarder.put({"step": 1})
    while forwarder.take_error() is None:
        time.sleep(0.01)
    began_s = time.monotonic()
    forwarder.flush(10)  # no checkpoint waits for it
    forwarder.end("finished")
    assert forwarder.ended_within(10) and time.monotonic() - began_s < 1.0
    assert tracker.rows == [] and tracker.outcome is None


# -- before the start ------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = TrackingSection(wandb_project="p")
    mlflow = TrackingSection(use_mlflow=True, mlflow_tracking_uri="http://host")
    monkeypatch.setattr(setup, "find_spec", lambda name: object())
    check_trackers(wandb, {})
    check_trackers(mlflow, {})
    check_trackers(TrackingSection(use_mlflow=True), {"MLFLOW_TRACKING_URI": "http://host"})
    with pytest.raises(ConfigError, match="^use_mlflow: true needs a server; give mlflow_tracking_uri"):
        check_trackers(TrackingSection(use_mlflow=True), {})
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    check_trackers(TrackingSection(), {})
    with pytest.raises(ConfigError, match=r"^wandb_project: p needs the package wandb, .*nemo-ray\[wandb\]"):
        check_trackers(wandb, {})
    with pytest.raises(ConfigError, match=r"^use_mlflow: true needs the package mlflow"):
        check_trackers(mlflow, {})


def test_variables_of_trackers_reach_other_nodes() -> None:
    environ = {"WANDB_API_KEY": "a", "MLFLOW_TRACKING_TOKEN": "b", "HOME": "c"}
    assert variables_to_pass_on(TrackingSection(), environ) == {}
    assert variables_to_pass_on(TrackingSection(wandb_project="p"), environ) == {"WANDB_API_KEY": "a"}
    both = TrackingSection(wandb_project="p", use_mlflow=True)
    assert variables_to_pass_on(both, environ).keys() == {"WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN"}


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(tmp_path_factory.mktemp("trackers"))
    torch.set_num_threads(threads)


def assert_shown(points: Points, run: RunDir, repeated: bool = False) -> None:
    """Every figure of metrics.jsonl, once; `repeated`: timings may be those of the first time."""
    rows = [*train_rows(run), *eval_rows(run)]
    wanted = {(name, row["step"]): value for row in rows for name, value in figures(row).items()}
    assert points.keys() == wanted.keys()
    timings = ("_s", "/s", "_bytes")
    for (name, step), value in wanted.items():
        assert len(points[name, step]) == 1, (name, step, points[name, step])
        if not (repeated and name.endswith(timings)):
            assert math.isclose(points[name, step][0], value, rel_tol=1e-5, abs_tol=1e-30), (name, step)
    assert len(wanted) > 60


def killed_and_resumed(runs: Runs, name: str, **changes: Any) -> RunDir:
    """A run that dies at step 4, a step after its checkpoint, and its continuation."""
    with pytest.raises(KilledError):
        runs.run(name, save_steps=3, die_at_evaluation=4, **changes)
    assert RunDir(runs.folder / "runs" / name).checkpoint_steps() == [3]
    return runs.run(name, save_steps=3, resume_from_checkpoint="auto", **changes)


def test_tensorboard_shows_each_figure_once(runs: Runs) -> None:
    run = runs.run("plain")
    assert_shown(tensorboard_points(run.tensorboard_dir), run)
    (text,) = tensorboard_texts(run.tensorboard_dir)
    assert '"learning_rate": 0.01' in text and '"held_out_rows"' in text
    again = killed_and_resumed(runs, "tensorboard")
    assert len(list(again.tensorboard_dir.iterdir())) == 2
    assert_shown(tensorboard_points(again.tensorboard_dir), again)
    assert len(tensorboard_texts(again.tensorboard_dir)) == 1


def test_tensorboard_after_a_death_before_the_first_checkpoint(runs: Runs) -> None:
    with pytest.raises(KilledError):
        runs.run("early", die_at_evaluation=2)
    run = runs.run("early", resume_from_checkpoint="auto")
    assert_shown(tensorboard_points(run.tensorboard_dir), run)


def test_event_files_hold_what_was_flushed(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path / "tensorboard", 0, [], {})
    tracker.open()
    for step in range(1, 301):
        tracker.log([{"step": step, "loss": 1.0 / step}])
    tracker.flush()
    points = tensorboard_points(tmp_path / "tensorboard")
    assert sorted(step for _, step in points) == list(range(1, 301))


def test_event_files_hold_all_rows_before_a_checkpoint_is_there(runs: Runs) -> None:
    """A process that dies right after a checkpoint leaves no hole."""
    spec = runs.spec("flushed", save_steps=2, eval_steps=3)
    run, seen = RunDir(spec.output_dir), set()

    def report(told: Mapping[str, Any]) -> None:
        new = set(run.checkpoint_steps()) - seen
        seen.update(new)
        if new:  # saved while training goes on: later rows may be there as well
            points = tensorboard_points(run.tensorboard_dir)
            assert {step for name, step in points if name == "train/loss"} >= set(range(1, max(new) + 1))

    with group_of_one():
        run_worker(spec, CPU, report)
    assert seen == {2, 4, 6}


def test_wandb_offline(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" * 6)
    run = killed_and_resumed(runs, "wandb", wandb_project="nemotron", wandb_group="ours")
    run_id = run.read_trackers()["wandb_run_id"]
    files = sorted(run.wandb_dir.glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}  # the same id in each attempt
    assert_shown(wandb_points(files[-1]), run)
    written = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert not any(b"hunter2" in data for data in written)
    assert all(wandb_group(file) == "ours" for file in files)
    found = wandb_config(files[-1])
    assert found["config"]["learning_rate"] == 0.01 and found["data"]["rows"] == 40
    assert run.read_run()["notices"] == []


def test_mlflow(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/store"
    keys = {"mlflow_tracking_uri": uri, "mlflow_experiment_name": "nemotron", "mlflow_run_name": "mine"}
    run = killed_and_resumed(runs, "mlflow", **keys)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("nemotron")
    (found,) = client.search_runs([experiment.experiment_id])  # the same run in each attempt
    assert found.info.run_id == run.read_trackers()["mlflow_run_id"]
    assert run.read_run()["notices"] == []
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["config.learning_rate"] == "0.01" and found.data.params["data.rows"] == "40"
    assert_shown(mlflow_points(uri, found.info.run_id), run, repeated=True)


def test_a_server_that_is_not_there_costs_one_line(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    keys = {"mlflow_tracking_uri": "http://127.0.0.1:9", "use_mlflow": True}
    run = runs.run("unreachable", **keys)
    (line,) = run.read_run()["notices"]
    assert line.startswith("MLflow: ") and line.endswith("metrics.jsonl has the figures")
    assert "hunter2" not in line
    assert len(train_rows(run)) == 6 and run.adapter_dir.exists()
    assert_shown(tensorboard_points(run.tensorboard_dir), run)
