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
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.data

from nemo_ray.config.schema import DataSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.pack_counts import CountsWriter
from nemo_ray.data.prepare import WindowTask, prepare_window, window_task
from nemo_ray.data.review import Progress, Review, missing_windows, not_writable, require_writable, survey
from nemo_ray.data.shards import DamagedShardError, ShardStats, read_stats
from nemo_ray.data.window_list import WindowList
from nemo_ray.errors import DataError, NemoRayError
from nemo_ray.failures import one_line
from nemo_ray.storage import publish_json, remove, remove_partials

_log = logging.getLogger(__name__)

_ABANDONED_AFTER_S = 3600.0
"""A shard is written in seconds: a partial file of this age has no writer any more."""


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
    remove(plan.failure_path)
    remove_partials(plan.directory, _ABANDONED_AFTER_S)
    try:
        found = survey(plan, order)
        missing = missing_windows(found)
        if missing:
            require_writable(plan)
        review = Review(plan, data.max_rejected_share, listing=listing, progress=progress)
        review.add_existing(found)
        counts = CountsWriter(plan)
        for window, known in found:
            if known is not None:
                counts.add(window, known.packs)
        job = _Job(
            plan=replace(plan, windows=WindowList(missing), eval_windows=WindowList()),
            held_out=frozenset(window.key for window in plan.eval_windows),
            data=data,
            base_model=base_model,
        )
        try:
            for index, stats in _run(job, num_cpus):
                counts.add(missing[index], stats.packs)
                counts.write_sometimes()
                review.add(missing[index], stats)
                if stop.is_set():
                    return
        finally:
            counts.write()
        review.finish()
    except Exception as error:
        if stop.is_set():  # it was told to end, perhaps by an end of Ray under its feet
            return
        failure = error if isinstance(error, NemoRayError) else _unforeseen(error)
        with contextlib.suppress(OSError):  # a full disk is told of by the error itself
            publish_json(plan.failure_path, {"error": str(failure)})
        if failure is error:
            raise
        raise failure from error


# -- Ray Data -------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """What all tasks share; `plan.windows` are those to prepare."""

    plan: DataPlan
    held_out: frozenset[str]
    data: DataSection
    base_model: str

    def task(self, index: int) -> WindowTask:
        """The task of one window."""
        window = self.plan.windows[index]
        held_out = window.key in self.held_out
        return window_task(self.plan, window, self.data, self.base_model, held_out=held_out)


def _run(job: _Job, num_cpus: float) -> Iterator[tuple[int, ShardStats]]:
    """Run the tasks on the cluster, and yield (index, statistics) as shards are published."""
    count = len(job.plan.windows)
    if not count:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Ray 2.60 warns that its bars are off, which is what was asked for.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    _print_errors(logging.getLogger("ray").isEnabledFor(logging.INFO))  # as session.py was told: --verbose
    # A number a task: from_items would put every task into the object store first, a millisecond each.
    numbers = ray.data.range(count, override_num_blocks=count)
    shared = ray.put(job)

    def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
        # tokenizers reads this at each call: its threads would fight with the other tasks for their CPUs.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            return {"id": row["id"], **prepare_task(_fetch(shared).task(row["id"]))}
        except Exception as error:
            _log.exception("a data task failed")  # in Ray's log of this process
            failure = _unforeseen(error)
            failure.add_note(traceback.format_exc())  # for error.log
            return {"id": row["id"], "stats": "", "error": pickle.dumps(failure)}

    for row in numbers.map(prepare_row, num_cpus=num_cpus).iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        stats = json.loads(row["stats"])
        stats["rejected_rows"] = tuple(tuple(entry) for entry in stats["rejected_rows"])
        yield row["id"], ShardStats(**stats)


def _unforeseen(error: Exception) -> DataError:
    return DataError(f"preparing the data failed: {one_line(error)}")


def _print_errors(printed: bool) -> None:
    """Whether errors that Ray Data logs are on the terminal too: ours is one line. Its log file has them."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # as Ray 2.60 calls it
            (handler.removeFilter if printed else handler.addFilter)(_below_error)


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


@lru_cache(maxsize=1)
def _fetch(job: "ray.ObjectRef[_Job]") -> _Job:
    """The job, once a process."""
    found: _Job = ray.get(job)
    return found


def prepare_task(task: WindowTask) -> dict[str, Any]:
    """Prepare a window, unless another run has done it. Errors for the user travel as values: Ray would wrap
    them in its own."""
    try:
        stats = _made_meanwhile(task.path) or prepare_window(task)
    except NemoRayError as error:
        return {"stats": "", "error": pickle.dumps(error)}
    except OSError as error:  # what fails to be read is told of by prepare_window
        return {"stats": "", "error": pickle.dumps(not_writable(task.path, error))}
    return {"stats": json.dumps(asdict(stats)), "error": b""}


def _made_meanwhile(path: str) -> ShardStats | None:
    """What another run that prepares the same has written since this one looked."""
    try:
        return read_stats(path)
    except (FileNotFoundError, DamagedShardError):
        return None
