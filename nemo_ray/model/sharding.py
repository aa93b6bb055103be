"""A tensor that may be sharded: this rank's rows of it, and the whole of it."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class RowShard:
    """Which rows of a weight of `shape` a parameter holds that is not whole, and no DTensor: `count` from
    `first` on, and perhaps padding. `model.row_shards` has them by name while a model is filled."""

    shape: torch.Size
    first: int
    count: int


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of a tensor that is whole or sharded by rows, and its first row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offset[1:]), "only dim 0 is ever sharded"
    return tensor.to_local(), offset[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; gathers it where it is sharded (every rank must call)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
