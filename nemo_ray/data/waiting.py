"""Waiting for a shard that the pipeline has not written yet."""

import time

from nemo_ray.data.manifest import DataPlan, shard_name
from nemo_ray.data.window_list import Window
from nemo_ray.errors import DataError
from nemo_ray.storage import exists, list_names, read_json
from nemo_ray.urls import is_url

_FIRST_POLL_S, _LONGEST_POLL_S = 0.01, 0.25
_FIRST_REMOTE_POLL_S, _LONGEST_REMOTE_POLL_S = 0.25, 2.0
"""Of an object store, where each look is paid for: two requests."""


class ShardWait:
    """Polls for shards; gives up when preparation failed, or gave no new shard for `timeout_s`."""

    def __init__(self, plan: DataPlan, timeout_s: float) -> None:
        self._plan = plan
        self._timeout_s = timeout_s
        self._waited_s = 0.0
        self._remote = is_url(plan.directory)
        self._seen: set[str] = set()

    def take_waited_s(self) -> float:
        """Seconds waited since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def wait_for(self, window: Window) -> str:
        """The path or URL of the window's shard, once it is there. Raises DataError or StorageError."""
        path = self._plan.shard_path(window)
        if not self._is_there(path):
            started = time.monotonic()
            try:
                self._poll(path, shard_name(window))
            finally:
                self._waited_s += time.monotonic() - started
        return path

    def _is_there(self, path: str) -> bool:
        """An object that was seen once is not looked up again."""
        if path in self._seen:
            return True
        found = exists(path)
        if found and self._remote:
            self._seen.add(path)
        return found

    def _poll(self, path: str, name: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        written = self._count()
        pause_s = _FIRST_REMOTE_POLL_S if self._remote else _FIRST_POLL_S
        longest_s = _LONGEST_REMOTE_POLL_S if self._remote else _LONGEST_POLL_S
        while not self._is_there(path):
            if exists(self._plan.failure_path):
                raise DataError(str(read_json(self._plan.failure_path)["error"]))
            if time.monotonic() >= deadline:
                now = self._count()
                if now <= written:
                    raise DataError(
                        f"no shard was prepared in {self._plan.directory} for {self._timeout_s:.0f} s, "
                        f"and this run waits for {name}: is preparation running, and do all nodes "
                        "see the folder?"
                    )
                written, deadline = now, time.monotonic() + self._timeout_s
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, longest_s)

    def _count(self) -> int:
        return sum(name.endswith(".arrow") for name in list_names(self._plan.directory))
