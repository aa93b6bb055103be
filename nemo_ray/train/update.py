"""One optimizer step on one worker: forward and backward passes over its packs, clipping, AdamW.

The loss of a step is the sum of its token losses divided by its number of target tokens, counted over all
workers and micro-batches before the first forward pass. So how a step is split never changes its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.packing import Pack
from nemo_ray.model.batch import PackedBatch
from nemo_ray.train.loss import next_token_targets
from nemo_ray.train.optim import AdamW, AdamW8bit, clip_gradients
from nemo_ray.train.parallelize import Parallel


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: packs and what their tokens must predict (B, T)."""

    batch: PackedBatch
    targets: torch.Tensor

    @classmethod
    def collate(cls, packs: Sequence[Pack], device: torch.device) -> "MicroBatch":
        """Stack packs of T tokens to (B, T) on `device`."""
        ids = torch.from_numpy(np.stack([pack.input_ids for pack in packs])).long().to(device)
        labels = torch.from_numpy(np.stack([pack.labels for pack in packs])).long().to(device)
        batch = PackedBatch.from_lengths(ids, [pack.lengths.tolist() for pack in packs])
        return cls(batch, next_token_targets(labels, batch.seq_idx))


@dataclass(frozen=True)
class Trainee:
    """What is trained, and with what; the base inside `model` may be shared by several of these one day."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW | AdamW8bit
    parallel: Parallel
    device: torch.device


class Update:
    """The steps of one `Trainee`."""

    def __init__(self, trainee: Trainee, train: TrainSection) -> None:
        self.trainee, self.train = trainee, train

    def __call__(
        self, packs: Sequence[Pack], num_targets: int, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward and AdamW over this rank's packs, at the learning rate `rate`.

        Args:
            num_targets: target tokens of the step, over all workers.

        Returns: this rank's loss sum, and the gradient norm of all before clipping, both on the device.
        """
        trainee, size = self.trainee, self.train.micro_batch_size
        starts = range(0, len(packs), size)
        loss_sum = torch.zeros((), device=trainee.device)
        scale = trainee.parallel.loss_scale / max(1, num_targets)
        for start in starts:
            micro = MicroBatch.collate(packs[start : start + size], trainee.device)
            trainee.parallel.set_last_micro_batch(start == starts[-1])
            loss = -trainee.model.target_log_probs(micro.batch, micro.targets).sum()
            (loss * scale).backward()
            loss_sum += loss.detach()
        parameters = list(trainee.parameters.values())
        trainee.parallel.sync_gradients(parameters)
        grad_norm = clip_gradients(parameters, self.train.max_grad_norm)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        return loss_sum, grad_norm
