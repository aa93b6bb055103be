"""The driver's side of a run in an object store: an actor on the driver's node that keeps the run's folder.

Workers on all nodes call it (remote_run.py), each call with the attempt that it is of: an older start is
refused here, as it is by the file system where driver and workers share one. Imports Ray in `start` only.
"""

import contextlib
import threading
from typing import Any

from nemo_ray.attempts import Attempt
from nemo_ray.errors import SupersededError
from nemo_ray.stored_run import PUSH_EVERY_S, StoredRunDir
from nemo_ray.train.driver import Driver
from nemo_ray.train.store_lock import read_holder

OPEN_METHODS = frozenset(
    ("append_error", "checkpoint_steps", "read_completions", "read_failures", "read_metrics", "read_run")
    + ("read_trackers", "stop_requested")
)
"""What any start may call."""
METHODS = frozenset(
    ("add_notice", "append_completion", "append_metrics", "check_attempt", "discard_checkpoint")
    + (
        "publish_checkpoint",
        "publish_result",
        "remove_checkpoint",
        "retire_checkpoint",
        "truncate_metrics",
        "update_run",
    )
    + ("write_nonfinite", "write_profile", "write_progress", "write_trackers")
)
"""What the newest start may call; methods of RunDir."""
_SLOW_METHODS = frozenset(("discard_checkpoint", "publish_checkpoint", "publish_result", "remove_checkpoint"))
"""That wait for the store: rows and progress do not wait for them."""
_THREADS = 8


class RunService:
    """Serves one run for as long as its driver lives."""

    def __init__(self, url: str, driver: Driver) -> None:
        self._run, self._driver = StoredRunDir(url), driver
        self._lock, self._slow_lock = threading.Lock(), threading.Lock()
        threading.Thread(target=self._push_often, name="push", daemon=True).start()

    def begin_attempt(self) -> str:
        """Take over from every earlier start of the run's workers; returns this one's name."""
        with self._lock:
            self._run.close_metrics()
            return self._run.begin_attempt().name

    def call(self, attempt: str | None, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the run's directory. Raises SupersededError, and what the method raises."""
        assert method in METHODS | OPEN_METHODS, method
        slow = method in _SLOW_METHODS
        if slow:
            self._require_driver()
        with self._slow_lock if slow else self._lock:
            if method in METHODS:
                self._require_newest(attempt)
            return getattr(self._run, method)(*arguments)

    def _require_newest(self, name: str | None) -> None:
        places = self._run.path, self._run.checkpoints_dir
        attempt = Attempt(places, str(name))
        attempt.check()
        self._run.attempt = attempt  # this process may be a new one, after the old one was lost

    def _require_driver(self) -> None:
        """A driver that was frozen may have been taken for dead by another one, on another cluster."""
        if read_holder(self._run.url) != self._driver:
            raise SupersededError(f"{self._run.url}: another driver took the run over")

    def _push_often(self) -> None:
        while True:
            threading.Event().wait(PUSH_EVERY_S)
            with contextlib.suppress(OSError, SupersededError):  # the next one may go through
                self._require_driver()
                self._run.push()


def start(url: str, driver: Driver) -> Any:
    """The actor's handle. It ends with this process, its driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=3, max_concurrency=_THREADS)(RunService)
    return actor.options(scheduling_strategy=here).remote(url, driver)
