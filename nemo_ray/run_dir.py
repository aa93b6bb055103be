"""The directory of one run: its names, its writer and its reader. Other tools read it too.

    run.json           resolved config, versions, git revision, data fingerprint, world size, the model
    metrics.jsonl      train rows and evaluation rows, appended and flushed by rank 0
    checkpoints/step-N complete if and only if it holds state.json
    adapter/ | model/  what the run is for
    completions.jsonl  {"prompt", "completion", "stage": "before" | "after", "step"}
    data_plan.json     the windows that the run began with
    tensorboard/       event files;  wandb/: W&B's own;  trackers.json: the runs' ids in W&B and MLflow
    nonfinite/         batches of steps whose loss or gradient was not finite
    rejected.jsonl     the rows that cannot be used, and why;  data.html: the data to look at, kept by `clear`
    progress.json      where the run is now;  stop: somebody asked it to end;  error.log: the full traceback
    prepared/          shards, where no dataset_prepared_path is given. Content-addressed: kept by `clear`
    .ray/              Ray Train's own storage;  ranks/: where each rank is;  failures.jsonl: what ended them
    .attempts/         what is not published yet: see attempts.py

Everything lies on one file system that driver and workers share. What the rows mean is the callers' business.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from nemo_ray.attempts import Attempt
from nemo_ray.storage import publish_bytes, publish_json, read_json, remove_tree

PREPARED_NAME = "prepared"
_STEP_FOLDER = re.compile(r"step-(\d+)")


class MetricsListener(Protocol):
    """Who else gets the rows of metrics.jsonl."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...


class RunDir:
    """Paths and small files of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.run_json = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints_dir = self.path / "checkpoints"
        self.adapter_dir = self.path / "adapter"
        self.model_dir = self.path / "model"
        self.completions_file = self.path / "completions.jsonl"
        self.data_plan_file = self.path / "data_plan.json"
        self.nonfinite_dir = self.path / "nonfinite"
        self.rejected_file = self.path / "rejected.jsonl"
        self.data_page = self.path / "data.html"
        self.progress_file = self.path / "progress.json"
        self.stop_file = self.path / "stop"
        self.error_file = self.path / "error.log"
        self.ray_dir = self.path / ".ray"
        self.ranks_dir = self.ray_dir / "ranks"
        self.failures_file = self.ray_dir / "failures.jsonl"
        self.tensorboard_dir = self.path / "tensorboard"
        self.wandb_dir = self.path / "wandb"
        self.trackers_file = self.path / "trackers.json"
        self.prepared_dir = self.path / PREPARED_NAME
        self.attempt: Attempt | None = None
        self._listener: MetricsListener | None = None
        self._metrics: BinaryIO | None = None

    # -- who may write ----------------------------------------------------------------------------

    def begin_attempt(self) -> Attempt:
        """Take over from every earlier start of this run's workers; returns this one."""
        # Checkpoints may lie on another disk, behind a link.
        self.attempt = Attempt.begin((self.path, self.checkpoints_dir))
        return self.attempt

    @property
    def own_attempt(self) -> Attempt:
        """The attempt that this object writes as."""
        assert self.attempt is not None, "begin_attempt comes first"
        return self.attempt

    def _check_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt.check()

    # -- does a run live here, and what else ------------------------------------------------------

    def _results(self) -> tuple[Path, ...]:
        """What one would be sorry to lose: the traces of a run that trained."""
        folders = (self.checkpoints_dir, self.adapter_dir, self.model_dir)
        return (self.metrics_file, self.completions_file, *folders)

    def _owned(self) -> tuple[Path, ...]:
        """Everything that `clear` removes."""
        helpers = (self.progress_file, self.stop_file, self.error_file, self.data_plan_file, self.ray_dir)
        trackers = (self.tensorboard_dir, self.wandb_dir, self.trackers_file)
        lists = (self.nonfinite_dir, self.rejected_file)
        return (*self._results(), *helpers, *trackers, *lists, self.run_json)

    def holds_run(self) -> bool:
        """Whether a run lives here (finished, broken off or under way)."""
        return self.run_json.exists()

    def has_results(self) -> bool:
        """Whether anything was recorded: a metrics row, a completion, a checkpoint, an adapter, a model."""
        return any(
            path.exists() and (_holds_any(path) if path.is_dir() else path.stat().st_size > 0)
            for path in self._results()
        )

    def has_trained(self) -> bool:
        """Whether there is something to continue or to keep: a step, a checkpoint, an adapter, a model."""
        folders = (self.checkpoints_dir, self.adapter_dir, self.model_dir)
        return any(path.is_dir() and _holds_any(path) for path in folders) or any(
            row["step"] > 0 for row in self.read_metrics()
        )

    def foreign_entries(self) -> list[str]:
        """Names in the folder that no run writes; hidden files and *.log do not count."""
        if not self.path.is_dir():
            return []
        own = {path.name for path in self._owned()} | {PREPARED_NAME, self.data_page.name}
        return sorted(
            name
            for name in os.listdir(self.path)
            if name not in own and not name.startswith(".") and not name.endswith(".log")
        )

    def clear(self, keep: Collection[Path] = ()) -> None:
        """Remove the run, run.json last; leave prepared shards, `keep`, and all that is not the run's."""
        for path in self._owned():
            if path in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    # -- run.json ---------------------------------------------------------------------------------

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """Write run.json, replacing what was there."""
        publish_json(self.run_json, dict(facts))

    def read_run(self) -> dict[str, Any]:
        """run.json, or {} where there is none."""
        return dict(_read_json_or_none(self.run_json) or {})

    def update_run(self, facts: Mapping[str, Any]) -> None:
        """Merge top-level keys into run.json. One writer at a time: the driver, while it trains rank 0.

        Raises: SupersededError
        """
        self._check_attempt()
        self.write_run({**self.read_run(), **facts})

    def add_notice(self, line: str) -> None:
        """Tell the user what is no error; of rank 0, which has written `notices` before."""
        self.update_run({"notices": [*self.read_run()["notices"], line]})

    def read_trackers(self) -> dict[str, str]:
        """trackers.json, or {} where there is none."""
        return dict(_read_json_or_none(self.trackers_file) or {})

    def write_trackers(self, ids: Mapping[str, str]) -> None:
        """Keep the ids of this run in trackers, by name."""
        publish_json(self.trackers_file, dict(ids))

    # -- metrics.jsonl and completions.jsonl ------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row, flush it, and tell the listener."""
        if self._metrics is not None:
            self._metrics.write(_line(row))
            self._metrics.flush()
        else:
            _append_jsonl(self.metrics_file, row)
        if self._listener is not None:
            self._listener.log(row)

    def listen(self, listener: MetricsListener) -> None:
        """From now on, every row that is appended through this object is told to `listener` too."""
        self._listener = listener

    def flush_metrics(self) -> None:
        """Have the listener write what it was told: called before a checkpoint gets its name."""
        if self._listener is not None:
            self._listener.flush()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete rows; a line cut short by a kill is left out."""
        return _read_jsonl(self.metrics_file)

    def truncate_metrics(self, step: int) -> None:
        """Keep the rows up to and including `step`: what came after it is trained again.

        The file is a new one, which this object appends to from here on. Raises SupersededError.
        """
        self._check_attempt()
        self.close_metrics()
        partial = self._aside(self.metrics_file)
        # Opened before it has its name: by then the name may be that of a newer attempt's file.
        self._metrics = open(partial, "wb")  # noqa: SIM115  it stays open
        self._metrics.writelines(_line(row) for row in self.read_metrics() if row["step"] <= step)
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self._publish(partial, self.metrics_file)

    def close_metrics(self) -> None:
        """Append no more rows to the file that `truncate_metrics` opened."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def append_completion(self, row: Mapping[str, Any]) -> None:
        """Append {"prompt", "completion", "stage", "step"}. Raises SupersededError."""
        self._check_attempt()
        _append_jsonl(self.completions_file, row)

    def read_completions(self) -> list[dict[str, Any]]:
        """All complete rows of completions.jsonl."""
        return _read_jsonl(self.completions_file)

    # -- checkpoints ------------------------------------------------------------------------------

    def checkpoint_dir(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is complete."""
        return self.checkpoints_dir / f"step-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.checkpoints_dir.is_dir():
            return []
        found = []
        for path in self.checkpoints_dir.iterdir():
            match = _STEP_FOLDER.fullmatch(path.name)
            if match and (path / "state.json").is_file():
                found.append(int(match.group(1)))
        return sorted(found)

    def complete_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [self.checkpoint_dir(step) for step in self.checkpoint_steps()]

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None

    # -- batches that were skipped ----------------------------------------------------------------

    def write_nonfinite(self, step: int, rank: int, facts: Mapping[str, Any], keep: int) -> None:
        """Write one rank's part of a skipped step's batch; the rank's oldest files beyond `keep` go.

        Raises: SupersededError
        """
        self._check_attempt()
        publish_json(self.nonfinite_dir / f"step-{step}-rank-{rank}.json", dict(facts))
        own = self.nonfinite_dir.glob(f"step-*-rank-{rank}.json")
        for path in sorted(own, key=lambda path: path.stat().st_mtime_ns)[:-keep]:
            path.unlink()

    # -- ranks and their failures -----------------------------------------------------------------

    def rank_file(self, rank: int) -> Path:
        """Where a rank says where it is, and leaves its stack."""
        return self.ranks_dir / f"rank-{rank}.txt"

    def append_failure(self, row: Mapping[str, Any]) -> None:
        """Append {"line": what happened, "restart": whether the workers start again}."""
        _append_jsonl(self.failures_file, row)

    def read_failures(self) -> list[dict[str, Any]]:
        """The failures of workers since the driver began, oldest first."""
        return _read_jsonl(self.failures_file)

    # -- progress and stop ------------------------------------------------------------------------

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Say where the run is. Atomic, not fsynced: it is written often and worth nothing after a crash.

        Raises: SupersededError
        """
        self._check_attempt()
        partial = self._aside(self.progress_file)  # rank 0 alone writes it
        partial.write_text(json.dumps(dict(progress)), encoding="utf-8")
        self._publish(partial, self.progress_file)

    def read_progress(self) -> dict[str, Any]:
        """The newest progress, or {} before the first."""
        return dict(_read_json_or_none(self.progress_file) or {})

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        publish_bytes(self.stop_file, b"")

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to end."""
        return self.stop_file.exists()

    def clear_stop(self) -> None:
        """Forget an earlier request, progress and failures: called before a run starts."""
        self.stop_file.unlink(missing_ok=True)
        self.progress_file.unlink(missing_ok=True)
        self.failures_file.unlink(missing_ok=True)

    # -- writing aside ----------------------------------------------------------------------------

    def _aside(self, path: Path) -> Path:
        if self.attempt is not None:
            return self.attempt.aside(path)
        return path.with_name(f".{path.name}.partial")

    def _publish(self, partial: Path, path: Path) -> None:
        if self.attempt is not None:
            self.attempt.publish(path)
        else:
            os.replace(partial, path)


def _holds_any(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _read_json_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last row short: it ends here
                file.write(b"\n")
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(row), ensure_ascii=False).encode() + b"\n"


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return rows
