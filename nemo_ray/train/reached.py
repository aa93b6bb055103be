"""When, and whether, the backward pass comes to a block."""

from collections.abc import Callable

import torch
from torch import nn


def first_reached(model: nn.Module) -> int:
    """The first block that has a backward pass; the number of blocks where none has."""
    chain = [model.model.embeddings, *model.model.layers]
    trains = [any(p.requires_grad for p in module.parameters()) for module in chain]
    return max(0, trains.index(True) - 1) if any(trains) else len(chain) - 1


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, tell: Callable[[], None]) -> torch.Tensor:
        ctx.tell = tell
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.tell()
        return grad, None


def when_reached(hidden: torch.Tensor, tell: Callable[[], None]) -> torch.Tensor:
    """A block's output, to go on with: `tell` is called when the block's backward pass is about to begin."""
    if not hidden.requires_grad:
        return hidden
    reached: torch.Tensor = _Reached.apply(hidden, tell)
    return reached
