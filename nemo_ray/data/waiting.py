"""Waiting for a shard that the pipeline has not written yet."""

import time
from pathlib import Path

from nemo_ray.data.manifest import DataPlan, Window
from nemo_ray.errors import DataError
from nemo_ray.storage import read_json

_LONGEST_POLL_S = 0.25


class ShardWait:
    """Polls for shards; gives up when preparation failed, or gave no new shard for `timeout_s`."""

    def __init__(self, plan: DataPlan, timeout_s: float) -> None:
        self._plan = plan
        self._timeout_s = timeout_s
        self._waited_s = 0.0

    def take_waited_s(self) -> float:
        """Seconds waited since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def wait_for(self, window: Window) -> Path:
        """The path of the window's shard, once it is there. Raises DataError."""
        path = self._plan.shard_path(window)
        if not path.exists():
            started = time.monotonic()
            try:
                self._poll(path)
            finally:
                self._waited_s += time.monotonic() - started
        return path

    def _poll(self, path: Path) -> None:
        deadline = time.monotonic() + self._timeout_s
        written = self._count()
        pause_s = 0.01
        while not path.exists():
            if self._plan.failure_path.exists():
                raise DataError(str(read_json(self._plan.failure_path)["error"]))
            if time.monotonic() >= deadline:
                now = self._count()
                if now <= written:
                    raise DataError(
                        f"no shard was prepared in {self._plan.directory} for {self._timeout_s:.0f} s, "
                        f"and this run waits for {path.name}: is preparation running, and do all nodes "
                        "see the folder?"
                    )
                written, deadline = now, time.monotonic() + self._timeout_s
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)

    def _count(self) -> int:
        return sum(1 for _ in Path(self._plan.directory).glob("*.arrow"))
