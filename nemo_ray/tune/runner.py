"""Ray Tune around the trials: it gives each a process, so many at a time, and starts one again that was lost.

Which trials there are and which of them stop is decided elsewhere. Tune hears of neither: to it, a trial that
is stopped comes to its end.
"""

import os
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from nemo_ray import session
from nemo_ray.tune.course import Course
from nemo_ray.tune.source import Source
from nemo_ray.tune.trial import DRIVER_CPUS, FAILED, Evaluation, Shared, run_trial
from nemo_ray.urls import is_url

TRIAL_FAILURES = 3
"""How often a trial's own process may be lost."""
_COURSES: dict[str, Course] = {}
_SOURCES: dict[str, Source] = {}
# What Tune does otherwise: files of its own for each trial, handlers of signals, a box in the terminal.
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def fit(course: Course, shared: Shared, source: Source, at_once: int) -> None:
    """Train the trials of `source`; returns when all have ended. Not for the main thread.

    Raises what Tune raises.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
    _COURSES[name], _SOURCES[name] = course, source
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    # Of a sweep in a store the driver reads the folders that the trials' processes keep on their node, which
    # may be a head without CPUs.
    needs = session.on_this_node() if is_url(course.folder.place) else {"CPU": DRIVER_CPUS}
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), needs)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=at_once,
            search_alg=Trials(name),
            reuse_actors=True,  # a process imports Ray Train once
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(course.folder.ray_dir),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
            callbacks=[Tell(name)],
        ),
    )
    try:
        tuner.fit()
    finally:
        del _COURSES[name], _SOURCES[name]


class Tell(tune.Callback):
    """Tells the course of what trials report. Tune pickles it, so it knows the course by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _COURSES[self._name].started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number, course = trial.config["number"], _COURSES[self._name]
        if "status" in result:
            course.ended(number, result["status"], result["reason"])
        elif "value" in result:
            course.evaluated(number, Evaluation(result["number"], result["step"], result["value"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        text = traceback.format_exception_only(error)[-1].strip() if error else "its process was lost"
        _COURSES[self._name].ended(trial.config["number"], FAILED, text)


class Trials(Searcher):
    """Hands out the source's trials, until there are no more or the course is closed. Known by name, too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if _COURSES[self._name].closed:
            return Searcher.FINISHED
        try:
            found = _SOURCES[self._name].next()
        except StopIteration:
            return Searcher.FINISHED
        return None if found is None else found._asdict()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to do is in the sweep's own directory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""
