"""Sweeps from Python: `from nemo_ray.tune import sweep; result = sweep("sweep.yaml"); result.best.params`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ray.errors import NemoRayError
from nemo_ray.session import require_none
from nemo_ray.stored_run import working_folder
from nemo_ray.tune.budget import Spent
from nemo_ray.tune.load import load_sweep
from nemo_ray.tune.shards import parse_shard
from nemo_ray.tune.stored_sweep import StoredSweepDir
from nemo_ray.tune.sweep_dir import SweepDir, TrialEnd
from nemo_ray.urls import is_url

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep that has ended."""

    number: int
    params: Mapping[str, Any]
    """What it tried, formulas included; with `pbt`, at its end."""
    end: TrialEnd
    path: Path
    """Its run directory."""
    seconds: float
    gpu_hours: float
    cost: float | None
    """None where no price is given, or no GPU is used."""

    @property
    def value(self) -> float | None:
        """The figure that it is judged by; None where it had none."""
        return self.end.value


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep."""

    path: Path
    """Its directory; best/ in it is the result of the best trial. Of a sweep in a store, a copy here."""
    metric: str
    trials: tuple[TrialResult, ...]
    """Those that have ended, by number."""
    best: TrialResult | None
    """None where no trial came to its end."""

    @property
    def dataframe(self) -> "DataFrame":
        """A row for each trial: number, status, the metric, evaluation, step, reason, seconds,
        gpu_hours, cost, and its parameters."""
        from pandas import DataFrame

        rows = [
            {
                "number": trial.number,
                "status": trial.end.status,
                self.metric: trial.value,
                "evaluation": trial.end.evaluation,
                "step": trial.end.step,
                "reason": trial.end.reason,
                "seconds": trial.seconds,
                "gpu_hours": trial.gpu_hours,
                "cost": trial.cost,
                **trial.params,
            }
            for trial in self.trials
        ]
        return DataFrame(rows)


def sweep(
    config: str | Path | Mapping[str, Any],
    *overrides: str,
    resume: bool = False,
    shard: str = "1/1",
    verbose: bool = False,
) -> SweepResult:
    """Run, or continue, a sweep, as `python -m nemo_ray.tune` does, in this process's main thread.

    config: path of a YAML file, or its content. overrides: "key=value", as on the command line. shard: "i/n",
    the i-th of n parts of the trials. verbose: print what Ray and the workers log.
    Raises: ConfigError where it is refused, NemoRayError where no trial came to its end, KeyboardInterrupt
    after Ctrl-C. What it prints is the command's.
    """
    found = load_sweep(config if isinstance(config, Mapping) else str(config), overrides)
    require_none()
    from nemo_ray.train.interrupts import EXIT_CODE as INTERRUPTED
    from nemo_ray.tune.launch import SweepLaunch

    launch = SweepLaunch(found, resume, parse_shard(shard, found), verbose)
    code = launch.run()
    if launch.error is not None:
        raise launch.error
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise NemoRayError("no trial of the sweep came to its end")
    return result_of(launch.folder)


def read_result(path: str | Path) -> SweepResult:
    """What came of the sweep in the directory `path`, or at that URL: then paths of the result are those of a
    copy here, without checkpoints. Raises: FileNotFoundError where there is none, OSError."""
    if not is_url(str(path)):
        return result_of(SweepDir(path))
    place = working_folder(str(path))
    folder = StoredSweepDir(str(path), place.with_name(f"{place.name}-result"))
    folder.pull()
    folder.fetch_best()
    return result_of(folder)


def result_of(folder: SweepDir) -> SweepResult:
    """The same of a directory that is up to date."""
    facts = folder.read()
    spent, trials = Spent.of(facts), []
    for number, params in enumerate(folder.points(facts["trials"])):
        end = folder.read_end(number)
        if end is not None:
            took = spent.seconds.get(number, 0.0), spent.gpu_hours(number), spent.cost(number)
            trials.append(TrialResult(number, params or {}, end, folder.trial(number).path, *took))
    best = next((trial for trial in trials if trial.number == facts.get("best")), None)
    return SweepResult(folder.path, facts["tune"]["metric"], tuple(trials), best)


def merge(parts: Sequence[str | Path], output_dir: str | Path) -> SweepResult:
    """Join the parts of a sweep that was split over clusters in `output_dir`, a new folder.

    parts: their directories, or URLs of these. Raises: ConfigError where they are no parts of one sweep.
    """
    from nemo_ray.tune.merge import merge as join_parts

    return read_result(join_parts([str(part) for part in parts], output_dir).path)
