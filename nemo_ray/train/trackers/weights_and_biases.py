"""W&B: a run of its own service, or offline in output_dir/wandb, for `wandb sync`.

Points are sent with their step. W&B takes none before the last step that it knows of: so of what a continued
run does again, it keeps the first. Online it is sent the rows that it lacks; offline every start writes a
whole run, so that the newest folder has everything.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import TrackingSection
from nemo_ray.train.trackers.rows import Row, figures


class WeightsAndBiases:
    """The run `run_id`, new or continued; `history`: its rows so far."""

    name = "W&B"

    def __init__(
        self,
        tracking: TrackingSection,
        folder: Path,
        run_id: str,
        history: Sequence[Row],
        facts: Mapping[str, Any],
    ) -> None:
        self._tracking, self._folder, self._run_id = tracking, folder, run_id
        self._history, self._facts = history, facts
        self._run: Any = None

    def open(self) -> None:
        if self._run is None:  # else the rows below had failed
            self._run = self._init()
        self.log([row for row in self._history if row["step"] >= self._run.starting_step])

    def _init(self) -> Any:
        import wandb

        tracking = self._tracking
        self._folder.mkdir(parents=True, exist_ok=True)
        mode = tracking.wandb_mode or os.environ.get("WANDB_MODE")
        return wandb.init(
            project=tracking.wandb_project,
            entity=tracking.wandb_entity,
            name=tracking.wandb_name or self._folder.parent.name,
            group=tracking.wandb_group,
            id=self._run_id,
            dir=str(self._folder.parent),
            mode=mode,
            resume="allow" if mode != "offline" else None,  # offline it cannot know, and says so
            config=dict(self._facts),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(figures(row), step=row["step"])

    def flush(self) -> None:
        """Nothing: what it lacks is sent when the run is continued."""

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
