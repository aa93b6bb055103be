"""The directory of one run: its names, its writer and its reader. Other tools read it too.

    run.json           resolved config, versions, git revision, data fingerprint, world size, the model
    metrics.jsonl      train rows and evaluation rows, appended and flushed by rank 0
    checkpoints/step-N complete if and only if it holds state.json
    adapter/ | model/  what the run is for
    completions.jsonl  {"prompt", "completion", "stage": "before" | "after", "step"}
    data_plan.json     the windows that the run began with
    tensorboard/       event files;  wandb/: W&B's own;  trackers.json: the runs' ids in W&B and MLflow
    nonfinite/         batches of steps whose loss or gradient was not finite
    profile.json.gz    a Chrome trace of the steps of `profiler_steps`
    report.html        what `nemo-ray report` made of it
    rejected.jsonl     the rows that cannot be used, and why;  data.html: the data to look at, kept by `clear`
    progress.json      where the run is now;  stop: somebody asked it to end;  error.log: the full traceback
    prepared/          shards, where no dataset_prepared_path is given. Content-addressed: kept by `clear`
    .ray/              Ray Train's own storage;  ranks/: where each rank is;  failures.jsonl: what ended them
    .attempts/         what is not published yet: see attempts.py

Everything lies on one file system that driver and workers share, or in an object store: see stored_run.py.
What the rows mean is the callers' business.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from nemo_ray.attempts import Attempt
from nemo_ray.jsonl import append_row, encode_row, read_rows
from nemo_ray.storage import publish_bytes, publish_json, read_json, remove_tree
from nemo_ray.urls import redact

PREPARED_NAME = "prepared"
STATE_NAME = "state.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


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
        self.profile_file = self.path / "profile.json.gz"
        self.rejected_file = self.path / "rejected.jsonl"
        self.data_page = self.path / "data.html"
        self.report_file = self.path / "report.html"
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

    @property
    def place(self) -> str:
        """The path or URL that the user knows the run by."""
        return str(self.path)

    def shown(self, path: Path) -> str:
        """What the user is told of one of the run's paths."""
        return str(path)

    def pull(self) -> None:
        """Before a driver reads the directory: take what is kept elsewhere. Raises OSError."""

    def push(self) -> None:
        """Before a driver ends: keep elsewhere what belongs there. Raises OSError."""

    def keep(self, path: Path) -> None:
        """The same for one file that a program without a run has written. Raises OSError."""

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

    def check_attempt(self) -> None:
        """Raises SupersededError where a newer start of the run took over from this object's."""
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
        lists = (self.nonfinite_dir, self.profile_file, self.rejected_file, self.report_file)
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
        return sorted(name for name in os.listdir(self.path) if self._is_foreign(name))

    def _is_foreign(self, name: str) -> bool:
        own = {path.name for path in self._owned()} | {PREPARED_NAME, self.data_page.name}
        return name not in own and not name.startswith(".") and not name.endswith(".log")

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
        self.check_attempt()
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
            self._metrics.write(encode_row(row))
            self._metrics.flush()
        else:
            append_row(self.metrics_file, row)
        if self._listener is not None:
            self._listener.log(row)

    def listen(self, listener: MetricsListener) -> None:
        """From now on, every row that is appended through this object is told to `listener` too."""
        self._listener = listener

    def flush_metrics(self) -> None:
        """Have the listener write what it was told: called before a checkpoint gets its name."""
        if self._listener is not None:
            self._listener.flush()

    def keeping_tracker_files(self) -> contextlib.AbstractContextManager[None]:
        """Around the time in which trackers write files into this directory."""
        return contextlib.nullcontext()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete rows; a line cut short by a kill is left out."""
        return read_rows(self.metrics_file)

    def truncate_metrics(self, step: int) -> None:
        """Keep the rows up to and including `step`: what came after it is trained again.

        The file is a new one, which this object appends to from here on. Raises SupersededError.
        """
        self.check_attempt()
        self.close_metrics()
        partial = self._aside(self.metrics_file)
        # Opened before it has its name: by then the name may be that of a newer attempt's file.
        self._metrics = open(partial, "wb")  # noqa: SIM115  it stays open
        self._metrics.writelines(encode_row(row) for row in self.read_metrics() if row["step"] <= step)
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
        self.check_attempt()
        append_row(self.completions_file, row)

    def read_completions(self) -> list[dict[str, Any]]:
        """All complete rows of completions.jsonl."""
        return read_rows(self.completions_file)

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
            if match and (path / STATE_NAME).is_file():
                found.append(int(match.group(1)))
        return sorted(found)

    def complete_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [self.checkpoint_dir(step) for step in self.checkpoint_steps()]

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None

    def checkpoint_place(self, step: int) -> str:
        """The path or URL of the folder that holds a complete checkpoint's tensors."""
        return str(self.checkpoint_dir(step))

    def checkpoint_aside(self, step: int) -> str:
        """The path or URL of the folder to which workers write their files of a checkpoint."""
        return str(self.own_attempt.aside(self.checkpoint_dir(step)))

    @property
    def checkpoint_token(self) -> str:
        """What sets this attempt's files apart, where those of others may lie beside them; else ""."""
        return ""

    def publish_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Make a checkpoint complete, all of whose files are there. Raises SupersededError."""
        try:
            # No folder is made for it: it is gone where a newer start took over.
            with open(Path(self.checkpoint_aside(step)) / STATE_NAME, "wb") as file:
                file.write(json.dumps(dict(state), indent=2).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            self.check_attempt()
            raise
        self.own_attempt.publish(self.checkpoint_dir(step))

    def discard_checkpoint(self, step: int) -> None:
        """Remove what was written of a checkpoint that will not be published."""
        shutil.rmtree(self.checkpoint_aside(step), ignore_errors=True)

    def remove_checkpoint(self, step: int) -> None:
        """Delete a complete checkpoint."""
        remove_tree(self.checkpoint_dir(step))

    def retire_checkpoint(self, step: int, why: str) -> str:
        """Take a complete checkpoint's name away, but keep what is there; returns the new name."""
        folder = self.checkpoint_dir(step)
        retired = folder.with_name(f"{folder.name}.{why}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        folder.rename(retired)
        return retired.name

    # -- what the run is for ----------------------------------------------------------------------

    def result_aside(self, final: Path) -> Path:
        """The folder in which adapter_dir or model_dir is made."""
        return self.own_attempt.aside(final)

    def publish_result(self, final: Path) -> None:
        """Give it its name, whole. Raises SupersededError."""
        self.own_attempt.publish(final)

    # -- errors -----------------------------------------------------------------------------------

    def append_error(self, who: str, text: str) -> None:
        """Append a traceback to error.log; a disk that does not take it hides nothing else."""
        with contextlib.suppress(OSError), open(self.error_file, "a", encoding="utf-8") as file:
            file.write(f"--- {who}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n{redact(text).rstrip()}\n\n")

    # -- batches that were skipped ----------------------------------------------------------------

    def write_nonfinite(self, step: int, rank: int, facts: Mapping[str, Any], keep: int) -> None:
        """Write one rank's part of a skipped step's batch; the rank's oldest files beyond `keep` go.

        Raises: SupersededError
        """
        self.check_attempt()
        publish_json(self.nonfinite_dir / f"step-{step}-rank-{rank}.json", dict(facts))
        own = self.nonfinite_dir.glob(f"step-*-rank-{rank}.json")
        for path in sorted(own, key=lambda path: path.stat().st_mtime_ns)[:-keep]:
            path.unlink()

    # -- a profile --------------------------------------------------------------------------------

    def write_profile(self, trace: bytes, facts: Mapping[str, Any]) -> None:
        """Write a gzipped Chrome trace of steps, and what it says into run.json. Raises: SupersededError"""
        self.check_attempt()
        publish_bytes(self.profile_file, trace)
        self.update_run({"profile": dict(facts)})

    # -- ranks and their failures -----------------------------------------------------------------

    def rank_file(self, rank: int) -> Path:
        """Where a rank says where it is, and leaves its stack."""
        return self.ranks_dir / f"rank-{rank}.txt"

    def append_failure(self, row: Mapping[str, Any]) -> None:
        """Append {"line": what happened, "restart": whether the workers start again}, with the time."""
        append_row(self.failures_file, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **row})

    def read_failures(self) -> list[dict[str, Any]]:
        """The failures of workers since the driver began, oldest first."""
        return read_rows(self.failures_file)

    # -- progress and stop ------------------------------------------------------------------------

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Say where the run is. Atomic, not fsynced: it is written often and worth nothing after a crash.

        Raises: SupersededError
        """
        self.check_attempt()
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
