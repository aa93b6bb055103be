"""Evaluation: the loss of a target token over the held-out packs, in all and for each dataset.

Owns how losses are summed: by document, in float64, over all workers, so that neither the number of workers
nor the micro-batch changes the result. When to evaluate, and what follows from it, is loop.py's.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.packing import Pack
from nemo_ray.data.reader import EvalReader, Repair
from nemo_ray.train.best import eval_names
from nemo_ray.train.loss import IGNORED
from nemo_ray.train.micro_batch import MicroBatch
from nemo_ray.train.update import Trainee
from nemo_ray.train.watchdog import Watchdog


class Evaluator:
    """Evaluates one `Trainee` on the held-out packs of `plan`; leaves its mode, weights and random state."""

    def __init__(
        self,
        trainee: Trainee,
        plan: DataPlan,
        micro_batch_size: int,
        watchdog: Watchdog,
        repair: Repair | None = None,
    ) -> None:
        self._trainee, self._plan, self._size, self._repair = trainee, plan, micro_batch_size, repair
        self._watchdog = watchdog
        names = eval_names(plan)
        self.names = list(names.values())
        self._place = np.zeros(len(plan.sources), dtype=np.int64)  # source -> its place in names
        self._place[list(names)] = np.arange(len(names))

    @torch.no_grad()
    def __call__(self) -> dict[str, Any] | None:
        """The fields of an evaluation row, but its step; equal on all workers, which all call this.

        None where there are no held-out rows, or none of them has a target.
        """
        if not self.names:
            return None
        began_s, waited_s = time.monotonic(), 0.0
        trainee, world_size = self._trainee, dist.get_world_size()
        reader = EvalReader(
            self._plan,
            rank=dist.get_rank(),
            world_size=world_size,
            packs_per_step=world_size * self._size,
            repair=self._repair,
        )
        sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=trainee.device)
        trainee.model.eval()
        self._watchdog.wait()
        while (packs := reader.next_step()) is not None:
            self._watchdog.work()
            waited_s += packs.wait_s
            micro = MicroBatch.collate(packs.packs, trainee.device)
            places = self._places(packs.packs).to(trainee.device)
            log_probs = trainee.model.target_log_probs(micro.batch, micro.targets)
            sums[0].index_add_(0, places, -log_probs.double())
            sums[1].index_add_(0, places, (micro.targets.flatten() != IGNORED).double())
            self._watchdog.wait()
        trainee.model.train()
        total = sums.cpu()
        dist.all_reduce(total)
        loss_sums, counts = total.tolist()
        if not sum(counts):
            return None
        return {
            "eval_loss": sum(loss_sums) / sum(counts),
            "eval_tokens": int(sum(counts)),
            "eval_s": time.monotonic() - began_s - waited_s,
            "eval_datasets": {
                name: {"loss": loss / count if count else None, "tokens": int(count)}
                for name, loss, count in zip(self.names, loss_sums, counts, strict=True)
            },
        }

    def _places(self, packs: tuple[Pack, ...]) -> torch.Tensor:
        """(B*T,) the place in `names` of each token's dataset; 0 for padding, which has no target."""
        rows = np.zeros((len(packs), self._plan.sequence_len), dtype=np.int64)
        for row, pack in zip(rows, packs, strict=True):
            tokens = np.repeat(self._place[pack.sources], pack.lengths[: len(pack.sources)])
            row[: len(tokens)] = tokens
        return torch.from_numpy(rows).flatten()
