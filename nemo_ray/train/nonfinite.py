"""Steps whose loss or gradient is not finite: what they read is written down, and many in a row end the run.

That such a step changes nothing is update.py's. Here is what a worker does once it knows, which on a GPU is
while the next step runs.
"""

import math
from typing import Any

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.packing import IGNORED, Pack
from nemo_ray.data.reader import StepPacks
from nemo_ray.errors import NonFiniteError
from nemo_ray.run_dir import RunDir

KEPT_STEPS = 50
"""Steps whose batches are kept: a run that often skips a step must not fill the disk."""
TOLD_STREAKS = 10


def or_none(value: float) -> float | None:
    """JSON has no number for what is not finite."""
    return value if math.isfinite(value) else None


class NonFiniteSteps:
    """One worker's account of them. Figures are equal on all workers, so all come to the same end."""

    def __init__(self, train: TrainSection, plan: DataPlan, run: RunDir, rank: int, world_size: int) -> None:
        self.limit, self.plan, self.run_dir = train.max_nonfinite_steps, plan, run
        self.rank, self.world_size = rank, world_size
        self.in_a_row = 0
        self._what = ""
        self._streaks = 0

    @property
    def next_may_end_the_run(self) -> bool:
        """Whether the figures of the next step must be known before the one after it begins."""
        return self.in_a_row + 1 >= self.limit

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.limit

    def add(self, step: int, loss: float, grad_norm: float, packs: StepPacks) -> bool:
        """Take the figures of a step, in order; returns whether it was skipped."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        figures = {"loss": loss, "gradient": grad_norm}
        lacking = [f"no finite {name}" for name, value in figures.items() if not math.isfinite(value)]
        self._what = f"step {step} has {' and '.join(lacking)}"
        self._write(step, loss, grad_norm, packs)
        if self.in_a_row == 1:
            self._streaks += 1
            if self.rank == 0 and self._streaks <= TOLD_STREAKS:
                self._tell()
        return True

    def error(self, checkpoint: str) -> NonFiniteError:
        """What ends the run; the weights before the first of these steps are in `checkpoint`."""
        return NonFiniteError(
            f"max_nonfinite_steps: {self.limit}: {self._what}, the last of so many in a row; their batches "
            f"are in {self.run_dir.shown(self.run_dir.nonfinite_dir)}, the weights that met them in "
            f"{checkpoint}; look at the rows that the batches name, or lower learning_rate and go on from an "
            "earlier checkpoint"
        )

    def _tell(self) -> None:
        line = f"{self._what}: it was skipped (1 in a row, max_nonfinite_steps: {self.limit})"
        if self._streaks == TOLD_STREAKS:
            line += "; further ones are only counted, in metrics.jsonl"
        self.run_dir.add_notice(line)

    def _write(self, step: int, loss: float, grad_norm: float, packs: StepPacks) -> None:
        """Keep this worker's packs, each as its shard has it."""
        drawn = packs.drawn[self.rank :: self.world_size]  # fewer than packs where the epoch ran out
        facts = {
            "step": step,
            "rank": self.rank,
            "loss": or_none(loss),
            "grad_norm": or_none(grad_norm),
            "packs": [self._facts(*name, pack) for name, pack in zip(drawn, packs.packs, strict=False)],
        }
        self.run_dir.write_nonfinite(step, self.rank, facts, KEPT_STEPS)

    def _facts(self, window: str, number: int, pack: Pack) -> dict[str, Any]:
        """A pack without padding, of whose tokens `targets` are 1."""
        source = self.plan.sources[int(pack.sources[0])]
        rows = [source.locate(int(row)) for row in pack.sample_rows]
        return {
            "window": window,
            "pack": number,
            "source": source.name,
            "rows": [{"file": file, "row": row} for file, row in rows],
            "lengths": pack.lengths[: len(rows)].tolist(),
            "input_ids": pack.input_ids[: pack.num_tokens].tolist(),
            "targets": (pack.labels[: pack.num_tokens] != IGNORED).astype(int).tolist(),
        }
