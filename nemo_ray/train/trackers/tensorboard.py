"""TensorBoard: event files in output_dir/tensorboard, one for each start of the run.

Written with tensorboardX, which Ray Train brings along; torch.utils.tensorboard would need the package
tensorboard itself, a server with a dozen dependencies, on every worker.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ray.train.trackers.rows import Row, figures


class TensorBoard:
    """Goes on after `step`, where the run's rows are `history`: later points of earlier files are void."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int, history: Sequence[Row], facts: Mapping[str, Any]) -> None:
        self._folder, self._step, self._history, self._facts = folder, step, history, facts

    def open(self) -> None:
        from tensorboardX import SummaryWriter

        # Before the first checkpoint nothing guarantees that a file holds what it should: it is written anew.
        if self._step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        continued = self._folder.is_dir() and any(self._folder.iterdir())
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=self._step + 1 if continued else None,
            max_queue=1000,
            flush_secs=10,  # an fsync
            filename_suffix=f".{self._step:09d}",  # files of one second are read in this order
        )
        if not continued:
            text = json.dumps(self._facts, indent=2, ensure_ascii=False)
            self._writer.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()), 0)
            self.log(self._history)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in figures(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, outcome: str) -> None:
        self._writer.close()
