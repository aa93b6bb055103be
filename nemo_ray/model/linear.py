"""Matrix products with a base weight, dense or in 4 bits, and the layer that holds one.

A dense weight may be of another dtype than the activations (float32 masters of a full fine-tune): it is cast
where it is used. A 4-bit weight is made whole for one product, forward and again backward, and kept by none.

Shapes: I inputs, O outputs, S rows sorted by expert, E experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model.quant import QuantizedWeight
from nemo_ray.model.remake import Remake

Weight = nn.Parameter | QuantizedWeight


def whole(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values of `weight` for one product at once: a 4-bit weight lies where the next one will."""
    return weight.borrow(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """x @ W.T with a W that does not train: nothing is saved; a 4-bit W is made again for x's gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, whole(weight, x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad @ whole(ctx.weight, grad.dtype), None


class Deferred(torch.autograd.Function):
    """The values of a result whose gradient another function owns.

    Such a function saves its inputs and returns a `stand_in` of the result's shape, without having computed
    anything; `Deferred.apply(stand_in, compute)` then has `compute()` in its place. Recomputation (torch's
    checkpoint) stops as soon as all that was saved is there again: so a product that nothing needs again, the
    last one of a block, is not taken a second time.
    """

    @staticmethod
    def forward(ctx, stand_in: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


def stand_in(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor of `shape` that takes no memory and has no values."""
    return like.new_empty(()).expand(shape)


def grouped_matmul_reference(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_matmul` as a loop over experts, for any dtype."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ m for a, b, m in zip(starts, ends.tolist(), matrices, strict=True)])


def grouped_matmul(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x (S, I), sorted by expert, times their expert's matrix (E, I, O), giving (S, O).

    Args:
        ends: (E,) int32, where an expert's rows end.
    """
    if x.dtype == torch.float64:  # torch._grouped_mm has no float64
        return grouped_matmul_reference(x, matrices, ends)
    return torch._grouped_mm(x.contiguous(), matrices, offs=ends)


def grouped_outer(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The sum over an expert's rows of x's row times y's: (S, O) and (S, I), sorted by expert, to (E, O, I).

    Zero for an expert without rows.
    """
    if x.dtype == torch.float64:
        starts = [0, *ends.tolist()[:-1]]
        return torch.stack([x[a:b].T @ y[a:b] for a, b in zip(starts, ends.tolist(), strict=True)])
    return torch._grouped_mm(x.contiguous().T, y.contiguous(), offs=ends)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., I) times `weight` (O, I) plus `bias` (O,), in x's dtype."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        return F.linear(x, weight.to(x.dtype), bias)
    out = _FrozenLinear.apply(x, weight)
    return out if bias is None else out + bias


class BaseLinear(nn.Module):
    """Stands in for nn.Linear in a block, under the same parameter names; its weight may be in 4 bits."""

    def __init__(self, weight: Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor, again: Remake | None = None) -> torch.Tensor:
        """(..., I) -> (..., O). Layers whose gradients need x may get it `again` instead of keeping it."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
