"""Ray Data: the missing windows of a plan to shards, one task a window, in the order that training reads
them.

Runs in the calling thread of the driver until all shards exist. A failure is written where waiting readers
see it. What a task does is prepare.py's.
"""

import contextlib
import json
import logging
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_ray.config.schema import DataSection
from nemo_ray.data.files import BLANK_LINE
from nemo_ray.data.manifest import DataPlan, Window
from nemo_ray.data.prepare import WindowTask, prepare_window, window_task
from nemo_ray.data.shards import DamagedShardError, ShardStats, read_stats
from nemo_ray.data.statistics import Totals, existing_stats
from nemo_ray.errors import ClusterError, DataError, NemoRayError
from nemo_ray.failures import one_line
from nemo_ray.shared_folder import missing_tokens, not_shared, remove_tokens, write_token
from nemo_ray.storage import publish_bytes, publish_json, remove, remove_partials

MAX_REJECTED_SHARE = 0.05
"""More rejected rows than this mean that the data is not what the configuration says: the run stops."""

_ABANDONED_AFTER_S = 3600.0
"""A shard is written in seconds: a partial file of this age has no writer any more."""

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
    remove_partials(plan.directory, _ABANDONED_AFTER_S)
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
        with contextlib.suppress(OSError):  # the directory may be what failed
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
        stats = _made_meanwhile(task.path) or prepare_window(task)
    except NemoRayError as error:
        return {"path": task.path, "stats": "", "error": pickle.dumps(error)}
    return {"path": task.path, "stats": json.dumps(asdict(stats)), "error": b""}


def _made_meanwhile(path: str) -> ShardStats | None:
    """What another run that prepares the same has written since this one looked."""
    try:
        return read_stats(path)
    except (FileNotFoundError, DamagedShardError):
        return None


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


# -- one folder for all nodes ---------------------------------------------------------------------


def check_shared(folders: Mapping[str, str], within_s: float = 60.0) -> None:
    """Let every node of the cluster write to each folder (or URL), and look for what the others wrote.

    `folders`: by the configuration's key. Raises ClusterError, within about 2 * `within_s`. Ray must be
    running; a single node is not asked.
    """
    found = ray.nodes()  # type: ignore[no-untyped-call]
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in found if node["Alive"]}
    if len(hosts) < 2:
        return
    check = uuid.uuid4().hex[:12]
    try:
        for (key, node), (error, _) in _on_all(hosts, within_s, folders, _write_token, check):
            raise ClusterError(f"{key}: {folders[key]} cannot be written on node {hosts[node]}: {error}")
        seen = _on_all(hosts, within_s, folders, _missing_tokens, check, list(hosts), within_s / 2)
        for (key, node), (error, missing) in seen:
            if error:
                raise ClusterError(f"{key}: {folders[key]} cannot be read on node {hosts[node]}: {error}")
            raise ClusterError(not_shared(key, folders[key], hosts[node], hosts[missing[0]]))
    finally:
        with contextlib.suppress(ClusterError):
            _on_all(hosts, within_s, folders, _remove_tokens, check)


Answer = tuple[str, list[str]]
"""(what failed, or nothing; nodes that were not seen)."""


def _on_all(
    hosts: Mapping[str, str], within_s: float, folders: Mapping[str, str], work: Any, *arguments: object
) -> list[tuple[tuple[str, str], Answer]]:
    """What is wrong with each (key, node), as `work` found it on that node."""
    asked = {}
    for node in hosts:
        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=strategy)
        for key, folder in folders.items():
            asked[task.remote(folder, node, *arguments)] = (key, node)
    done, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=within_s)
    if waiting:
        key, node = asked[waiting[0]]
        raise ClusterError(
            f"node {hosts[node]} did not answer within {within_s:.0f} s; is it alive, and does its file "
            f"system answer ({folders[key]})?"
        )
    try:
        answers: dict[tuple[str, str], Answer] = {asked[ref]: ray.get(ref) for ref in done}
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a node was lost while folders were compared: {one_line(error)}") from error
    return [(place, answer) for place, answer in sorted(answers.items()) if any(answer)]


def _write_token(folder: str, node: str, check: str) -> Answer:
    try:
        write_token(folder, check, node)
    except OSError as error:
        return one_line(error), []
    return "", []


def _missing_tokens(folder: str, node: str, check: str, nodes: list[str], within_s: float) -> Answer:
    try:
        return "", missing_tokens(folder, check, nodes, within_s)
    except OSError as error:
        return one_line(error), []


def _remove_tokens(folder: str, node: str, check: str) -> Answer:
    remove_tokens(folder, check)
    return "", []
