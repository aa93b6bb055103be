"""What goes into one forward pass: packs, stacked to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_ray.data.packing import Pack
from nemo_ray.model.batch import PackedBatch
from nemo_ray.train.loss import next_token_targets


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
