"""What can be told of a run from its directory, a folder or a URL, whoever runs it; changes nothing."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ray.errors import ConfigError
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import exists, join
from nemo_ray.stored_run import StoredRunDir
from nemo_ray.train import driver_lock, store_lock
from nemo_ray.train.driver import Driver, process_lives
from nemo_ray.urls import is_url

if TYPE_CHECKING:
    from nemo_ray.tune.sweep_dir import SweepDir

RUNNING, BROKEN_OFF, UNSEEN = "running", "broken off", "running or broken off"
_RECENT_STEPS = 20


@dataclass(frozen=True)
class Event:
    """Something that happened to a run; `time`, in UTC, is empty where it is not known."""

    time: str
    what: str


@dataclass(frozen=True)
class Seen:
    """A run, as its directory tells of it at one moment."""

    run: RunDir
    facts: Mapping[str, Any]
    """run.json"""
    rows: list[dict[str, Any]]
    """metrics.jsonl"""
    progress: Mapping[str, Any]
    holder: Driver | None
    """The driver that holds the directory, alive or dead."""
    failures: list[dict[str, Any]]
    """Of workers, since the newest driver began."""

    @property
    def state(self) -> str:
        """`outcome` of run.json, or RUNNING, BROKEN_OFF; UNSEEN where its driver cannot be seen from here."""
        if "outcome" in self.facts:
            return str(self.facts["outcome"])
        alive = process_lives(self.holder) if self.holder is not None else False
        return UNSEEN if alive is None else RUNNING if alive else BROKEN_OFF

    @property
    def goes_on(self) -> bool:
        """Whether more may come."""
        return self.state in (RUNNING, UNSEEN)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations that have a loss."""
        return [row for row in self.rows if row.get("eval_loss") is not None]

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the lowest loss after step 0."""
        later = [row for row in self.evaluations if row["step"] > 0]
        return min(later, key=lambda row: row["eval_loss"], default=None)

    def recent(self, name: str) -> float | None:
        """The median of a figure over the last steps."""
        values = [row[name] for row in self.steps[-_RECENT_STEPS:] if row.get(name) is not None]
        return statistics.median(values) if values else None

    @property
    def waiting_share(self) -> float:
        """The part of all steps' time that went by without data."""
        seconds = sum(row["step_s"] for row in self.steps)
        return sum(row["data_wait_s"] for row in self.steps) / seconds if seconds else 0.0

    def events(self) -> list[Event]:
        """Starts, lost workers, ends and notices, oldest first; notices, whose time is not known, last."""
        found: list[Event] = []
        attempts = [*self.facts.get("earlier", ()), {**self.facts, "failures": self.failures}]
        for attempt in attempts:
            count = attempt.get("world_size")
            found.append(
                Event(_time(attempt, "started_at"), f"started with {count} workers" if count else "started")
            )
            for failure in attempt.get("failures", ()):
                then = "; the workers started again" if failure["restart"] else ""
                found.append(Event(_time(failure, "time"), failure["line"] + then))
            if "outcome" in attempt:
                why = f": {attempt['error']}" if attempt.get("error") else ""
                found.append(Event(_time(attempt, "ended_at"), f"{attempt['outcome']}{why}"))
        return found + [Event("", notice) for notice in self.facts.get("notices", ())]


def _time(row: Mapping[str, Any], name: str) -> str:
    """2026-11-29 16:00:44 UTC"""
    return str(row.get(name, "")).replace("T", " ").replace("+00:00", " UTC")


@contextlib.contextmanager
def see(place: str) -> Iterator[Seen]:
    """The run in the directory or at the URL `place`; of a store there is a copy, until the end.

    Raises: ConfigError where no run is there, OSError where it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-ray-view-") as name:
        run: RunDir = StoredRunDir(place, Path(name) / "run") if is_url(place) else RunDir(place)
        run.pull()
        if not run.holds_run():
            raise ConfigError(f"{place}: no run is here (no run.json); name the output_dir of one")
        facts = run.read_run()
        holder = store_lock.read_holder(place) if is_url(place) else driver_lock.read_holder(run.path)
        failures = run.read_failures() or list(facts.get("failures", ()))
        yield Seen(run, facts, run.read_metrics(), run.read_progress(), holder, failures)


@contextlib.contextmanager
def see_sweep(place: str) -> Iterator["SweepDir | None"]:
    """The sweep in the directory or at the URL `place`; None where none is there. Raises OSError."""
    from nemo_ray.tune.stored_sweep import StoredSweepDir
    from nemo_ray.tune.sweep_dir import SWEEP_NAME, SweepDir

    if not is_url(place):
        folder = SweepDir(place)
        yield folder if folder.holds_sweep() else None
    elif not exists(join(place, SWEEP_NAME)):
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="nemo-ray-view-") as name:
            stored = StoredSweepDir(place, Path(name) / "sweep")
            stored.pull()
            yield stored
