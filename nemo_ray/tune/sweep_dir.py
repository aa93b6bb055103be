"""The directory of one sweep: its names, its writer and its reader.

    sweep.json             the tune section, the configuration that all trials share, how the sweep ended
    trials/NNN/            a run directory for each trial; trial.json in it: its point, how it ended
    report.html            charts and a table, also while it runs
    population.json        with scheduler pbt: which trials went on from which, and with what values
    best/                  the best trial's adapter or model, and config.yaml, which trains it again
    prepared/              shards that all trials share, where no dataset_prepared_path is given
    error.log              the full traceback, where the sweep itself failed

Everything lies on one file system that the driver and all nodes share, or in a store: stored_sweep.py.
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import yaml

from nemo_ray.run_dir import PREPARED_NAME, RunDir
from nemo_ray.storage import publish_folder, publish_json, read_json, remove_tree

TRIALS_NAME = "trials"
SWEEP_NAME = "sweep.json"
TRIAL_NAME = "trial.json"
POPULATION_NAME = "population.json"
BEST_NAME = "best"
CONFIG_NAME = "config.yaml"


def trial_name(number: int) -> str:
    """Of a trial's folder."""
    return f"{number:03d}"


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended. What it trained beyond `evaluation` does not count."""

    number: int
    status: str
    """finished, stopped (by the scheduler) or failed."""
    evaluation: int
    """The one that it is judged by, counted from 1; 0 where there was none."""
    value: float | None
    step: int
    reason: str = ""
    rung: int | None = None
    """Index among the scheduler's rungs, of a trial that was stopped."""


@dataclass(frozen=True)
class Change:
    """A trial of a population that went on from another's weights, with other values."""

    evaluation: int
    """After which, counted from 1."""
    step: int
    number: int
    source: int
    point: Mapping[str, Any]


@dataclass(frozen=True)
class Population:
    """What became of a sweep's trials under `pbt`."""

    generations: int = 0
    """Those that are over."""
    changes: tuple[Change, ...] = ()


def population_of(found: Mapping[str, Any]) -> Population:
    """What population.json holds."""
    return Population(found["generations"], tuple(Change(**change) for change in found["changes"]))


class SweepDir:
    """Paths and small files of a sweep. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sweep_json = self.path / SWEEP_NAME
        self.trials_dir = self.path / TRIALS_NAME
        self.best_dir = self.path / BEST_NAME
        self.population_file = self.path / POPULATION_NAME
        self.report_file = self.path / "report.html"
        self.ray_dir = self.path / ".ray"

    @property
    def place(self) -> str:
        """The path or URL that the user knows the sweep by."""
        return str(self.path)

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.path.resolve().name

    def shown(self, path: Path) -> str:
        """What the user is told of one of the sweep's paths."""
        return str(path)

    def pull(self, numbers: Iterable[int] | None = None) -> None:
        """Before the directory is read: take what is kept elsewhere, of the trials `numbers`, or of all.
        Raises OSError."""

    def keep(self, path: Path) -> None:
        """Keep a file elsewhere, if it is there and belongs there. Raises OSError."""

    def trial_place(self, number: int) -> str:
        """The output_dir of a trial."""
        return str(self.trials_dir / trial_name(number))

    def trial(self, number: int) -> RunDir:
        """The run directory of a trial."""
        return RunDir(self.trial_place(number))

    def holds_sweep(self) -> bool:
        """Whether a sweep lives here."""
        return self.sweep_json.exists()

    def foreign_entries(self) -> list[str]:
        """Names in a folder without a sweep that neither a sweep's preparation nor a system puts there."""
        if not self.path.is_dir():
            return []
        known = {PREPARED_NAME, "rejected.jsonl", "data.html", "error.log"}
        return sorted(name for name in os.listdir(self.path) if name not in known and name[0] != ".")

    def read(self) -> dict[str, Any]:
        """sweep.json."""
        return dict(read_json(self.sweep_json))

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write sweep.json, replacing what was there."""
        publish_json(self.sweep_json, dict(facts))
        self.keep(self.sweep_json)

    def clear(self) -> None:
        """Remove the sweep, sweep.json last; prepared shards stay."""
        self.population_file.unlink(missing_ok=True)  # it is of the trials that are there
        for folder in (self.trials_dir, self.best_dir, self.ray_dir):
            if folder.exists():
                remove_tree(folder)
        self.report_file.unlink(missing_ok=True)
        self.sweep_json.unlink(missing_ok=True)

    def read_end(self, number: int) -> TrialEnd | None:
        """How a trial ended; None while it has not."""
        try:
            return TrialEnd(**read_json(self.trial(number).path / TRIAL_NAME))
        except (FileNotFoundError, JSONDecodeError):  # its folder is being made anew from a store
            return None

    def write_end(self, end: TrialEnd) -> None:
        """Record how a trial ended."""
        value = None if end.value is None or math.isnan(end.value) else end.value
        publish_json(self.trial(end.number).path / TRIAL_NAME, {**asdict(end), "value": value})

    def read_population(self) -> Population:
        """population.json; nothing where there is none."""
        try:
            return population_of(read_json(self.population_file))
        except FileNotFoundError:
            return Population()

    def write_population(self, population: Population) -> None:
        """Write population.json, replacing what was there."""
        publish_json(self.population_file, asdict(population))
        self.keep(self.population_file)

    def points(self, begun: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any] | None]:
        """The values that each trial has now. `begun`: those that it began with, None where that is open."""
        found = [None if point is None else dict(point) for point in begun]
        for change in self.read_population().changes:
            found[change.number] = dict(change.point)
        return found

    def drop_checkpoints(self, number: int) -> None:
        """Remove a trial's checkpoints."""
        shutil.rmtree(self.trial(number).checkpoints_dir, ignore_errors=True)

    def copy_checkpoint(self, source: int, number: int, step: int) -> None:
        """Put trial `source`'s checkpoint of `step` in the place of trial `number`'s. Raises OSError."""
        take_over(self.trial(number), self.trial(source), step)

    def publish_best(self, number: int, config: Mapping[str, Any]) -> Path:
        """Copy the result of a trial to best/, with the configuration that trains it; returns best/."""
        run = self.trial(number)
        result = run.adapter_dir if run.adapter_dir.exists() else run.model_dir
        aside = self.path / f".{BEST_NAME}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(result, aside)
        (aside / CONFIG_NAME).write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        if self.best_dir.exists():
            remove_tree(self.best_dir)
        aside.rename(self.best_dir)
        return self.best_dir


def take_over(run: RunDir, source: RunDir, step: int) -> None:
    """Put another run's checkpoint of `step` in the place of this one's, both in folders. Raises OSError."""
    for newer in run.checkpoint_steps():
        if newer > step:
            run.remove_checkpoint(newer)
    place = run.checkpoint_dir(step)
    aside = place.with_name(f".{place.name}.taken-over")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source.checkpoint_dir(step), aside)
    publish_folder(aside, place)
