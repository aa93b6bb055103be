"""Experiment trackers: TensorBoard always, W&B and MLflow where they are configured. Rank 0 only.

They are given the rows of metrics.jsonl as these are appended (RunDir.listen), each by a thread of its own.
"""

import secrets
import time
from collections.abc import Callable, Sequence

from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.run_dir import RunDir
from nemo_ray.train.trackers.forwarder import Forwarder, Tracker
from nemo_ray.train.trackers.mlflow_server import MLflow
from nemo_ray.train.trackers.rows import Row, facts
from nemo_ray.train.trackers.tensorboard import TensorBoard
from nemo_ray.train.trackers.weights_and_biases import WeightsAndBiases

_FLUSH_WITHIN_S = 10.0
_CLOSE_WITHIN_S = 30.0


class Trackers:
    """All trackers of a run; `warn` gets one line for each that fails."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._forwarders = [Forwarder(tracker) for tracker in trackers]
        self._warn = warn

    def log(self, row: Row) -> None:
        """Queue a row for all of them."""
        for forwarder in self._forwarders:
            forwarder.put(row)
        self._tell_errors()

    def flush(self) -> None:
        """Return when the rows so far are in TensorBoard's files. The others find out what they lack."""
        for forwarder in self._forwarders:
            if forwarder.name == TensorBoard.name:
                forwarder.flush(_FLUSH_WITHIN_S)

    def close(self, outcome: str) -> None:
        """Send what is left, within half a minute, and end the runs as `finished`, `stopped` or `failed`."""
        for forwarder in self._forwarders:
            forwarder.end(outcome)
        until_s = time.monotonic() + _CLOSE_WITHIN_S
        late = [f.name for f in self._forwarders if not f.ended_within(max(0.0, until_s - time.monotonic()))]
        self._tell_errors()
        for name in late:
            self._warn(f"{name}: did not take the last figures within {_CLOSE_WITHIN_S:g} s")

    def _tell_errors(self) -> None:
        for forwarder in self._forwarders:
            if (error := forwarder.take_error()) is not None:
                self._warn(f"{forwarder.name}: {error}; training goes on, and metrics.jsonl has the figures")


def open_trackers(
    config: Config, plan: DataPlan, run: RunDir, step: int, more: Sequence[Tracker] = ()
) -> Trackers:
    """The trackers of a run that begins, or goes on, after `step`, where metrics.jsonl ends; and `more`."""
    history, told, tracking = run.read_metrics(), facts(config, plan), config.tracking
    found: list[Tracker] = [TensorBoard(run.tensorboard_dir, step, history, told), *more]
    ids = run.read_trackers()
    if tracking.sends_to_wandb:
        ids.setdefault("wandb_run_id", tracking.wandb_run_id or secrets.token_hex(4))
        run.write_trackers(ids)
        found.append(WeightsAndBiases(tracking, run.wandb_dir, ids["wandb_run_id"], history, told))
    if tracking.sends_to_mlflow:

        def keep_id(run_id: str) -> None:
            run.write_trackers({**ids, "mlflow_run_id": run_id})

        name = tracking.mlflow_run_name or run.place.rsplit("/", 1)[-1]
        found.append(MLflow(tracking, name, ids.get("mlflow_run_id"), keep_id, history, told))

    return Trackers(found, run.add_notice)
