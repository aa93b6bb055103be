"""MLflow: a run on the server that mlflow_tracking_uri names.

MLflow keeps every point that it is sent. So a continued run asks which steps are there, sends those that are
missing, and does not send again what it trains again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_ray.config.schema import TrackingSection
from nemo_ray.train.trackers.rows import Row, figures, flat

_METRICS_A_REQUEST, _PARAMETERS_A_REQUEST = 1000, 100  # the server's limits
_PARAMETER_CHARACTERS = 6000
_PARENT_TAG = "mlflow.parentRunId"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """The run `run_id`, or a new one, whose id is told to `keep_id`; `history`: its rows so far."""

    name = "MLflow"

    def __init__(
        self,
        tracking: TrackingSection,
        run_name: str,
        run_id: str | None,
        keep_id: Callable[[str], None],
        history: Sequence[Row],
        facts: Mapping[str, Any],
    ) -> None:
        self._tracking, self._run_name, self._keep_id = tracking, run_name, keep_id
        self._run_id = run_id
        self._history, self._facts = history, facts
        self._sent: set[tuple[str, int]] = set()

    def open(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._tracking.mlflow_tracking_uri)
        if self._run_id is None:
            self._run_id = self._create()
        else:
            self._client.update_run(self._run_id, status="RUNNING")
        known = self._client.get_run(self._run_id).data
        if not known.params:
            self._send_facts()
        self._sent = {
            (name, point.step)
            for name in known.metrics
            for point in self._client.get_metric_history(self._run_id, name)
        }
        self.log(self._history)

    def _create(self) -> str:
        run_id = _create_run(self._client, self._tracking, self._run_name)
        self._keep_id(run_id)
        return run_id

    def _send_facts(self) -> None:
        from mlflow.entities import Param

        found = [Param(name, text[:_PARAMETER_CHARACTERS]) for name, text in flat(self._facts)]
        for start in range(0, len(found), _PARAMETERS_A_REQUEST):
            self._client.log_batch(self._run_id, params=found[start : start + _PARAMETERS_A_REQUEST])

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = {(name, row["step"]): value for row in rows for name, value in figures(row).items()}
        missing = [key for key in points if key not in self._sent]
        for start in range(0, len(missing), _METRICS_A_REQUEST):
            part = missing[start : start + _METRICS_A_REQUEST]
            metrics = [Metric(name, points[name, step], now_ms, step) for name, step in part]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._sent.update(part)

    def flush(self) -> None:
        """Nothing: what the server lacks is sent when the run is continued."""

    def close(self, outcome: str) -> None:
        self._client.set_terminated(self._run_id, _STATUS[outcome])


def begin_parent(tracking: TrackingSection, run_name: str, run_id: str | None) -> str:
    """The run, new or continued, under which others are listed; returns its id. Raises what MLflow raises."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking.mlflow_tracking_uri)
    if run_id is None:
        return _create_run(client, tracking, run_name)
    client.update_run(run_id, status="RUNNING")
    return run_id


def end_parent(tracking: TrackingSection, run_id: str, outcome: str) -> None:
    """Its end: `finished`, `stopped` or `failed`. Raises what MLflow raises."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking.mlflow_tracking_uri).set_terminated(run_id, _STATUS[outcome])


def _create_run(client: Any, tracking: TrackingSection, run_name: str) -> str:
    name = tracking.mlflow_experiment_name or "Default"
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    parent = tracking.mlflow_parent_run_id
    tags = {} if parent is None else {_PARENT_TAG: parent}
    return str(client.create_run(number, run_name=run_name, tags=tags).info.run_id)
