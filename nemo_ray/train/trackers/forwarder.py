"""A thread for each tracker, so that no network and no file system is ever waited for by a step.

A tracker that fails gives one warning, is tried again from time to time, and never ends the training.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_ray.failures import one_line
from nemo_ray.train.trackers.rows import Row, without_secrets

RETRY_S = 60.0


class Tracker(Protocol):
    """One tool. Its functions are called from one thread; what they raise is told once, and tried again."""

    name: str

    def open(self) -> None:
        """Begin or continue the run, and send the rows of earlier attempts that it lacks."""

    def log(self, rows: Sequence[Row]) -> None:
        """Take rows of metrics.jsonl, in order."""

    def flush(self) -> None:
        """Have what was taken outlive this process, as far as that can be had at once."""

    def close(self, outcome: str) -> None:
        """End the run as `finished`, `stopped` or `failed`."""


class Forwarder:
    """Takes rows for one tracker at any time, and gives them to it in its own time."""

    def __init__(self, tracker: Tracker, retry_s: float = RETRY_S) -> None:
        self.name = tracker.name
        self._tracker, self._retry_s = tracker, retry_s
        self._rows: queue.SimpleQueue[Row | threading.Event] = queue.SimpleQueue()
        self._error: str | None = None
        self._told = self._failing = False
        self._closing = threading.Event()
        self._outcome = "failed"
        self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Queue a row; returns at once."""
        self._rows.put(row)

    def flush(self, limit_s: float) -> None:
        """Return when the tracker has taken all rows so far, or after `limit_s`; at once where it fails."""
        if self._failing:
            return
        taken = threading.Event()
        self._rows.put(taken)
        taken.wait(limit_s)

    def end(self, outcome: str) -> None:
        """Have it send what is left, end the run as `outcome`, and try nothing twice any more."""
        self._outcome = outcome
        self._closing.set()
        self._rows.put(threading.Event())  # wakes the thread

    def ended_within(self, limit_s: float) -> bool:
        """Whether that was done within `limit_s`."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def take_error(self) -> str | None:
        """The first failure, once."""
        if self._error is None or self._told:
            return None
        self._told = True
        return self._error

    def _run(self) -> None:
        if not self._tried(self._tracker.open):
            return
        while not (self._closing.is_set() and self._rows.empty()):
            items = [self._rows.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._rows.get_nowait())
            rows = [item for item in items if not isinstance(item, threading.Event)]
            if rows and not self._tried(lambda rows=rows: self._tracker.log(rows)):
                return
            flushes = [item for item in items if isinstance(item, threading.Event)]
            if flushes and not self._tried(self._tracker.flush):
                return
            for taken in flushes:
                taken.set()
        self._tried(lambda: self._tracker.close(self._outcome))

    def _tried(self, work: Callable[[], None]) -> bool:
        """Do it, again and again until it is done; False where the end came before that."""
        while True:
            last = self._closing.is_set()
            try:
                work()
                self._failing = False
                return True
            except Exception as error:
                self._failing = True
                self._error = self._error or without_secrets(one_line(error))
            if last:
                return False
            self._closing.wait(self._retry_s)
