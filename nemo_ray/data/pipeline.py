"""Ray Data: the missing windows of a plan to shards, one task a window, in the order that training reads
them.

Runs in the calling thread of the driver until all shards exist. A failure is written where waiting readers
see it. What a task does is prepare.py's.
"""

import json
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from nemo_ray.config.schema import DataSection
from nemo_ray.data.files import BLANK_LINE
from nemo_ray.data.manifest import DataPlan, Window
from nemo_ray.data.prepare import WindowTask, prepare_window, window_task
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.statistics import Totals, existing_stats
from nemo_ray.errors import DataError, NemoRayError
from nemo_ray.failures import one_line
from nemo_ray.storage import publish_bytes, publish_json, remove

MAX_REJECTED_SHARE = 0.05
"""More rejected rows than this mean that the data is not what the configuration says: the run stops."""

Progress = Callable[[int, int], None]
"""Told (windows ready, windows in all) after each window."""


def prepare(
    plan: DataPlan,
    data: DataSection,
    base_model: str,
    *,
    order: Sequence[int] | None = None,
    num_cpus: float = 1.0,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the missing shards: held-out windows, then plan.windows in `order` (indices; default: as
    planned).

    Blocks until all exist, or until `stop` is set. `num_cpus` is reserved for each task. Ray must be running.
    Raises DataError, and writes the same line to plan.failure_path for the readers.
    """
    remove(plan.failure_path)
    try:
        _prepare(
            plan,
            data,
            base_model,
            range(len(plan.windows)) if order is None else order,
            num_cpus,
            stop,
            progress,
        )
    except Exception as error:
        line = one_line(error)
        if not isinstance(error, NemoRayError):
            line = f"preparing the data failed: {line}"
        publish_json(plan.failure_path, {"error": line})
        if isinstance(error, NemoRayError):
            raise
        raise DataError(line) from error


def _prepare(
    plan: DataPlan,
    data: DataSection,
    base_model: str,
    order: Sequence[int],
    num_cpus: float,
    stop: threading.Event | None,
    progress: Progress | None,
) -> None:
    held_out = {window.key for window in plan.eval_windows}
    windows = {
        window.key: window for window in (*plan.eval_windows, *(plan.windows[index] for index in order))
    }
    review = _Review(plan, len(windows), progress)
    missing: list[WindowTask] = []
    by_path: dict[str, Window] = {}
    for window, stats in zip(windows.values(), existing_stats(plan, list(windows.values())), strict=True):
        if stats is not None:
            review.add(window, stats)
        else:
            missing.append(window_task(plan, window, data, base_model, held_out=window.key in held_out))
            by_path[plan.shard_path(window)] = window
    for path, made in _run(missing, num_cpus):
        review.add(by_path[path], made)
        if stop is not None and stop.is_set():
            return
    review.write_rejected()


# -- Ray Data -------------------------------------------------------------------------------------


def _run(tasks: Sequence[WindowTask], num_cpus: float) -> Iterator[tuple[str, ShardStats]]:
    """Run the tasks on the cluster, and yield (path, statistics) as shards are published."""
    if not tasks:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Ray 2.60 warns that its bars are off, which is what was asked for.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    items = [{"task": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(_prepare_row, num_cpus=num_cpus)
    for row in dataset.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        stats = json.loads(row["stats"])
        stats["rejected_rows"] = tuple(tuple(entry) for entry in stats["rejected_rows"])
        yield row["path"], ShardStats(**stats)


def _prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """The body of a Ray Data task. Errors for the user travel as values: Ray would wrap them in its own."""
    # tokenizers reads this at each call: its threads would fight with the other tasks for their CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    task = pickle.loads(row["task"])
    try:
        stats = prepare_window(task)
    except NemoRayError as error:
        return {"path": task.path, "stats": "", "error": pickle.dumps(error)}
    return {"path": task.path, "stats": json.dumps(asdict(stats)), "error": b""}


# -- rows that cannot be used ---------------------------------------------------------------------


class _Review:
    """Counts what became of the rows, reports progress, and stops the run when too many are rejected."""

    def __init__(self, plan: DataPlan, num_windows: int, progress: Progress | None) -> None:
        self._plan = plan
        self._num_windows = num_windows
        self._progress = progress
        self._num_rows = plan.num_rows + sum(window.num_rows for window in plan.eval_windows)
        self._totals = Totals()
        self._rejected: list[dict[str, Any]] = []

    def add(self, window: Window, stats: ShardStats) -> None:
        """Count one shard. Raises DataError when more than 5% of all rows are rejected."""
        self._totals.add(stats)
        for index, reason, detail in stats.rejected_rows:
            file, row = self._plan.locate(window, index)
            self._rejected.append({"file": file, "row": row, "reason": reason, "detail": detail})
        rejected = self._totals.num_rejected
        if rejected > MAX_REJECTED_SHARE * self._num_rows:
            self.write_rejected()
            raise DataError(self._complaint(rejected))
        if self._progress is not None:
            self._progress(self._totals.windows, self._num_windows)

    def write_rejected(self) -> None:
        """List the rejected rows, one JSON object a line; no file where there are none."""
        if self._rejected:
            lines = [json.dumps(entry, ensure_ascii=False) for entry in self._rejected]
            publish_bytes(self._plan.rejected_path, ("\n".join(lines) + "\n").encode("utf-8", "replace"))

    def _complaint(self, rejected: int) -> str:
        reasons = [
            (reason, count) for reason, count in self._totals.rejected.most_common() if reason != BLANK_LINE
        ]
        reason, count = reasons[0]
        examples = [entry for entry in self._rejected if entry["reason"] == reason]
        places = ", ".join(f"{entry['file']} row {entry['row']}" for entry in examples[:3])
        return (
            f"datasets: {rejected:,} of the {self._totals.rows:,} rows prepared so far were rejected, more "
            f"than {MAX_REJECTED_SHARE:.0%} of all {self._num_rows:,}; most often ({count:,}): {reason} "
            f"({places}). All are listed in {self._plan.rejected_path}"
        )
