"""Sweeps in trackers: the names and groups of trials, and MLflow's run above them."""

from pathlib import Path

import pytest

from nemo_ray.config.schema import TrackingSection
from nemo_ray.train.trackers.mlflow_server import MLflow
from nemo_ray.tune.groups import Parent, trial_keys


def test_trials_are_named_after_their_sweep_and_grouped() -> None:
    assert trial_keys(TrackingSection(), "sweep", "003") == {}
    wandb = TrackingSection(wandb_project="p")
    assert trial_keys(wandb, "sweep", "003") == {"wandb_group": "sweep", "wandb_name": "sweep-003"}
    named = TrackingSection(wandb_project="p", wandb_group="g", wandb_name="n", use_mlflow=True)
    assert trial_keys(named, "sweep", "003") == {
        "wandb_group": "g",
        "wandb_name": "n-003",
        "mlflow_run_name": "sweep-003",
    }


def test_trials_are_listed_under_a_run_that_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = TrackingSection(mlflow_tracking_uri=f"file://{tmp_path}/store", mlflow_experiment_name="mine")
    notes: list[str] = []
    parent = Parent(tracking, "sweep", None, notes.append)
    parent.begin()
    assert parent.run_id is not None
    of_trial = tracking.model_copy(update={"mlflow_parent_run_id": parent.run_id})
    trial = MLflow(of_trial, "sweep-000", None, lambda run_id: None, [], {"config": {"lora_r": 4}})
    trial.open()
    trial.close("finished")
    parent.end("stopped")
    again = Parent(tracking, "sweep", parent.run_id, notes.append)
    client = mlflow.MlflowClient(tracking_uri=tracking.mlflow_tracking_uri)
    assert client.get_run(parent.run_id).info.status == "KILLED"
    again.begin()
    assert again.run_id == parent.run_id and client.get_run(parent.run_id).info.status == "RUNNING"
    again.end("finished")
    experiment = client.get_experiment_by_name("mine")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {"sweep", "sweep-000"} and found["sweep"].info.status == "FINISHED"
    assert found["sweep-000"].data.tags["mlflow.parentRunId"] == parent.run_id
    assert "mlflow.parentRunId" not in found["sweep"].data.tags and not notes


def test_a_server_that_is_not_there_ends_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = TrackingSection(use_mlflow=True, mlflow_tracking_uri="http://me:hunter2@127.0.0.1:9")
    notes: list[str] = []
    parent = Parent(tracking, "sweep", None, notes.append)
    parent.begin()
    parent.end("finished")
    (note,) = notes
    assert parent.run_id is None and note.startswith("note: MLflow: ") and "hunter2" not in note
    unused = Parent(TrackingSection(), "sweep", None, notes.append)
    unused.begin()
    unused.end("finished")
    assert unused.run_id is None and len(notes) == 1
