"""One trial, in the process that Ray Tune gives it: an ordinary run whose evaluations are told to the sweep.

The run directory is the whole truth: a trial that starts again reads from it what was told before. It is
asked to end as any run is, by its stop file.
"""

import contextlib
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nemo_ray import session
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.failures import one_line
from nemo_ray.object_store import expect_answers
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import open_run
from nemo_ray.train import cluster, outputs
from nemo_ray.train.background import Background
from nemo_ray.train.best import EVAL_LOSS, metric_of
from nemo_ray.train.driver_lock import DriverLock
from nemo_ray.train.launch import driver_lock
from nemo_ray.train.progress import MetricsTail
from nemo_ray.train.resources import Demand
from nemo_ray.train.store_lock import StoreLock

POLL_S = 0.2
DRIVER_CPUS = 0.01
"""Of a trial's own process, which waits for its workers; Ray 2.60 refuses 0."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Shared:
    """What all trials have in common."""

    plan: DataPlan
    wanted: Demand
    metric: str
    job_id: str | None
    verbose: bool = False
    """Print what Ray and the workers log."""


@dataclass(frozen=True)
class Evaluation:
    """What a trial tells of an evaluation after the first step."""

    number: int
    """Counted from 1."""
    step: int
    value: float


class Teller:
    """New evaluations of a run that may go back to a checkpoint: each step's is told once."""

    def __init__(self, run: RunDir, metric: str) -> None:
        self._metric, self._told = metric, 0
        self._tail = MetricsTail(run)

    def new(self) -> list[Evaluation]:
        """Those since the last call."""
        found = []
        for row in self._tail.new_rows():
            if EVAL_LOSS in row and row["step"] > 0:
                self._told += 1
                found.append(Evaluation(self._told, row["step"], metric_of(row, self._metric)))
        return found


def run_trial(config: Mapping[str, Any], shared: Shared) -> None:
    """Train a trial to its end; the trial's own configuration is in Tune's. Called by Tune, in an actor."""
    from ray import tune

    session.Environment().add({**session.SETTINGS, **cluster.environment(shared.wanted)})
    asked = config["config"], config["pause_after"]
    status, reason = train(*asked, shared, lambda found: tune.report(vars(found)))
    tune.report({"status": status, "reason": reason})


def train(
    config: Config, pause_after: int | None, shared: Shared, tell: Callable[[Evaluation], None]
) -> tuple[str, str]:
    """Begin or continue the run of `config` and see it to its end, or to the evaluation `pause_after`;
    returns how it ended, and why.

    Raises what makes its directory unusable: ConfigError where another driver holds it.
    """
    expect_answers(config.output_dir)
    run = open_run(config.output_dir)
    lock = driver_lock(run, shared.job_id, lambda line: None)
    lock.claim()
    try:
        run.pull()
        start = outputs.decide_start(run, config)
        if start.checkpoint is not None:
            outputs.check_plan(run, shared.plan)
        outputs.begin(run, start, shared.plan)
        facts = outputs.run_facts(config, shared.plan, shared.wanted.num_workers, shared.job_id)
        outputs.record_run(run, facts)
        told = {"config": config, "plan": shared.plan, "output_dir": run.place, "pause_after": pause_after}
        status, reason = _fit(run, told, shared, lock, tell)
        shutil.rmtree(run.ray_dir, ignore_errors=True)
        run.stop_file.unlink(missing_ok=True)
        ended_at = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk is told of by `reason`
            run.update_run({"outcome": status, "ended_at": ended_at})
            run.push()
        return status, reason
    finally:
        lock.release()


def _fit(
    run: RunDir,
    told: Mapping[str, Any],
    shared: Shared,
    lock: DriverLock | StoreLock,
    tell: Callable[[Evaluation], None],
) -> tuple[str, str]:
    asked = shared.wanted, told["config"].ray, lock.me, shared.verbose
    work = Background("fit", lambda: cluster.fit(None, told, run, *asked))
    teller = Teller(run, shared.metric)
    while not work.wait(POLL_S):
        with contextlib.suppress(OSError):  # a hiccup of the file system is no reason to end a trial
            lock.check()
        for evaluation in teller.new():
            tell(evaluation)
    for evaluation in teller.new():
        tell(evaluation)
    if work.error is not None:
        text = "".join(traceback.format_exception(work.error))
        run.append_error("trial", text)
        return FAILED, one_line(work.error)
    stopped = isinstance(work.result, Mapping) and work.result.get("stopped")
    return (STOPPED, "") if stopped else (FINISHED, "")
