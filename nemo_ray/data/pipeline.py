"""Ray Data: the missing windows of a plan to shards, one task a window, in the order that training reads
them.

Runs in the calling thread of the driver until all shards exist. A failure is written where waiting readers
see it. What a task does is prepare.py's, what becomes of the rows review.py's.
"""

import contextlib
import json
import logging
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.data

from nemo_ray.config.schema import DataSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import WindowTask, prepare_window, window_task
from nemo_ray.data.review import Progress, Review, missing_windows, not_writable, require_writable, survey
from nemo_ray.data.shards import ShardStats
from nemo_ray.errors import DataError, NemoRayError
from nemo_ray.failures import one_line
from nemo_ray.storage import publish_json


def prepare(
    plan: DataPlan,
    data: DataSection,
    base_model: str,
    *,
    order: Sequence[int] | None = None,
    num_cpus: float = 1.0,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    listing: Path | None = None,
) -> None:
    """Write the missing shards: held-out windows, then plan.windows in `order` (indices; default: as
    planned).

    Blocks until all exist, or until `stop` is set. `num_cpus` is reserved for each task. `listing`: where the
    rejected rows are listed. Ray must be running.
    Raises DataError, and writes the same line to plan.failure_path for the readers.
    """
    stop = stop or threading.Event()
    plan.failure_path.unlink(missing_ok=True)
    try:
        found = survey(plan, order)
        missing = missing_windows(found)
        if missing:
            require_writable(plan)
        review = Review(plan, data.max_rejected_share, listing=listing, progress=progress)
        review.add_existing(found)
        held_out = {window.key for window in plan.eval_windows}
        tasks = [
            window_task(plan, window, data, base_model, held_out=window.key in held_out) for window in missing
        ]
        by_path = {task.path: window for task, window in zip(tasks, missing, strict=True)}
        for path, stats in _run(tasks, num_cpus):
            review.add(by_path[path], stats)
            if stop.is_set():
                return
        review.finish()
    except Exception as error:
        if stop.is_set():  # it was told to end, perhaps by an end of Ray under its feet
            return
        failure = (
            error
            if isinstance(error, NemoRayError)
            else DataError(f"preparing the data failed: {one_line(error)}")
        )
        with contextlib.suppress(OSError):  # a full disk is told of by the error itself
            publish_json(plan.failure_path, {"error": str(failure)})
        if failure is error:
            raise
        raise failure from error


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
    except OSError as error:  # what fails to be read is told of by prepare_window
        return {"path": task.path, "stats": "", "error": pickle.dumps(not_writable(task.path, error))}
    return {"path": task.path, "stats": json.dumps(asdict(stats)), "error": b""}
