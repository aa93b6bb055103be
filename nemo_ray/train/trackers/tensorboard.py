"""TensorBoard: event files in output_dir/tensorboard, one for each start of the run.

Written with tensorboardX, which Ray Train brings along; torch.utils.tensorboard would need the package
tensorboard itself, a server with a dozen dependencies, on every worker. Its SummaryWriter hands events to a
thread of its own, for which its flush does not wait (2.6.5): here the tracker's thread writes them itself.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ray.train.trackers.rows import Row, figures

FLUSH_EVERY_S = 10.0
"""Each is an fsync."""


class TensorBoard:
    """Goes on after `step`, where the run's rows are `history`: later points of earlier files are void."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int, history: Sequence[Row], facts: Mapping[str, Any]) -> None:
        self._folder, self._step, self._history, self._facts = folder, step, history, facts
        self._flushed_s = -FLUSH_EVERY_S

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        # Before the first checkpoint nothing guarantees that a file holds what it should: it is written anew.
        if self._step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        continued = any(self._folder.iterdir())
        # Files of one second are read in the order of their names.
        self._writer = EventsWriter(str(self._folder / "events"), f".{self._step:09d}")
        if continued:  # points from this step on are void
            self._add(self._step + 1, session_log=SessionLog(status=SessionLog.START))
            return
        facts = json.dumps(self._facts, indent=2, ensure_ascii=False)
        self._add(0, summary=text("configuration", "\n".join(f"    {line}" for line in facts.splitlines())))
        self.log(self._history)

    def log(self, rows: Sequence[Row]) -> None:
        from tensorboardX.summary import scalar

        for row in rows:
            for name, value in figures(row).items():
                self._add(row["step"], summary=scalar(name, value))
        if time.monotonic() - self._flushed_s >= FLUSH_EVERY_S:
            self.flush()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._writer.flush()
        self._flushed_s = time.monotonic()

    def close(self, outcome: str) -> None:
        self._writer.close()
