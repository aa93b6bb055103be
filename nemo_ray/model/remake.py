"""Tensors that a backward pass makes again, each by one cheap kernel, from what is kept in any case."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Remake:
    """How a tensor's values come once more: `make(*sources)`.

    Attributes:
        sources: detached; the function that first made the tensor keeps them for its own gradient, so that
            who saves them too adds no memory.
        make: holds no tensor that may be a source.
    """

    sources: tuple[torch.Tensor, ...]
    make: Callable[..., torch.Tensor]


def unchanged(tensor: torch.Tensor) -> Remake:
    """Of a tensor that is kept itself."""
    return Remake((tensor,), lambda tensor: tensor)
