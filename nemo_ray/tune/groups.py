"""A sweep in trackers: what its trials are called there, their group, and MLflow's run above them."""

from collections.abc import Callable
from typing import Any

from nemo_ray.config.schema import TrackingSection
from nemo_ray.failures import one_line
from nemo_ray.train.background import Background
from nemo_ray.train.trackers import mlflow_server
from nemo_ray.train.trackers.rows import without_secrets

_ANSWERS_WITHIN_S = 30.0


def trial_keys(tracking: TrackingSection, sweep: str, trial: str) -> dict[str, Any]:
    """Keys of the configuration of the trial named `trial` in the sweep named `sweep`."""
    keys: dict[str, Any] = {}
    if tracking.sends_to_wandb:
        keys["wandb_group"] = tracking.wandb_group or sweep
        keys["wandb_name"] = f"{tracking.wandb_name or sweep}-{trial}"
    if tracking.sends_to_mlflow:
        keys["mlflow_run_name"] = f"{tracking.mlflow_run_name or sweep}-{trial}"
    return keys


class Parent:
    """The run of a sweep in MLflow, where that is used. A server that does not answer ends no sweep."""

    def __init__(
        self, tracking: TrackingSection, sweep: str, run_id: str | None, warn: Callable[[str], None]
    ) -> None:
        """`run_id`: that of an earlier start."""
        self.run_id = run_id
        self._tracking, self._warn = tracking, warn
        self._name = tracking.mlflow_run_name or sweep
        self._open = False

    def begin(self) -> None:
        """Make the run, or go on with it; `run_id` says which. Waits for the server half a minute."""
        if self._tracking.sends_to_mlflow:
            begun = self._ask(lambda: mlflow_server.begin_parent(self._tracking, self._name, self.run_id))
            self._open = begun is not None
            self.run_id = begun or self.run_id

    def end(self, outcome: str) -> None:
        """End it as `finished`, `stopped` or `failed`; a second time does nothing."""
        if self._open and self.run_id is not None:
            run_id, self._open = self.run_id, False
            self._ask(lambda: mlflow_server.end_parent(self._tracking, run_id, outcome))

    def _ask(self, work: Callable[[], Any]) -> Any:
        asked = Background("mlflow", work)
        if not asked.wait(_ANSWERS_WITHIN_S):
            self._warn(f"note: MLflow: no answer within {_ANSWERS_WITHIN_S:g} s; the sweep goes on")
        elif asked.error is not None:
            self._warn(f"note: MLflow: {without_secrets(one_line(asked.error))}; the sweep goes on")
        return asked.result
