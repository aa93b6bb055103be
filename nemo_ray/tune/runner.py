"""Ray Tune around the trials: it gives each a process, so many at a time, and starts one again that was lost.

Which trials there are and which of them stop is decided elsewhere; Tune hears of it only that no more begin.
"""

import os
import traceback
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from nemo_ray.tune.course import Course
from nemo_ray.tune.trial import FAILED, Evaluation, Shared, run_trial

DRIVER_CPUS = 0.01
"""Of a trial's own process, which waits for its workers; Ray 2.60 refuses 0."""
TRIAL_FAILURES = 3
"""How often a trial's own process may be lost."""
_COURSES: dict[str, Course] = {}
# What Tune does otherwise: files of its own for each trial, handlers of signals.
_SETTINGS = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}


def fit(course: Course, shared: Shared, numbers: Sequence[int], at_once: int) -> None:
    """Train the trials; returns when all have ended. Not for the main thread. Raises what Tune raises."""
    from ray import tune

    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
    _COURSES[name] = course
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), {"CPU": DRIVER_CPUS})
    tell, gate = _hooks(name)
    tuner = tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(list(numbers))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, scheduler=gate),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(course.folder.ray_dir),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
            callbacks=[tell],
        ),
    )
    tuner.fit()


def _hooks(name: str) -> tuple[Any, Any]:
    """A callback and a scheduler. Tune pickles both, so they find the course by its name."""
    from ray.tune import Callback
    from ray.tune.schedulers import FIFOScheduler

    class Tell(Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _COURSES[name].started(trial.config["number"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            number, course = trial.config["number"], _COURSES[name]
            if "status" in result:
                course.ended(number, result["status"], result["reason"])
            elif "value" in result:
                course.evaluated(number, Evaluation(result["number"], result["step"], result["value"]))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            error = trial.get_error() if hasattr(trial, "get_error") else None
            text = traceback.format_exception_only(error)[-1].strip() if error else "its process was lost"
            _COURSES[name].ended(trial.config["number"], FAILED, text)

    class Gate(FIFOScheduler):
        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            if not _COURSES[name].closed:
                return super().choose_trial_to_run(tune_controller)
            for trial in tune_controller.get_trials():
                if trial.status == trial.PENDING:
                    tune_controller.stop_trial(trial)
            return None

    return Tell(), Gate()
