"""Matrix products with a base weight, dense or in 4 bits, and the layer that holds one.

A dense weight may be of another dtype than the activations (float32 masters of a full fine-tune): it is cast
where it is used. A 4-bit weight is made whole for one product, forward and again backward, and kept by none.

Shapes: I inputs, O outputs, S rows sorted by expert, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model.quant import QuantizedWeight

Weight = nn.Parameter | QuantizedWeight


class _FrozenLinear(torch.autograd.Function):
    """x @ W.T with a W that trains not: nothing is saved, W is made again for the gradient of x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.borrow(x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad @ ctx.weight.borrow(grad.dtype), None


class _FrozenGroupedLinear(torch.autograd.Function):
    """The same of a bank (E, O, I) and rows sorted by expert."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: QuantizedWeight, ends: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ends)
        return grouped_matmul(x, weight.borrow(x.dtype).transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (ends,) = ctx.saved_tensors
        return grouped_matmul(grad, ctx.weight.borrow(grad.dtype), ends), None, None


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


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., I) times `weight` (O, I) plus `bias` (O,), in x's dtype."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if isinstance(weight, QuantizedWeight):
        out = _FrozenLinear.apply(x, weight)
        return out if bias is None else out + bias
    return F.linear(x, weight.to(x.dtype), bias)


def grouped_linear(x: torch.Tensor, weight: Weight, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x (S, I), sorted by expert, times their expert's weight (E, O, I), giving (S, O)."""
    if isinstance(weight, QuantizedWeight):
        return _FrozenGroupedLinear.apply(x, weight, ends)
    return grouped_matmul(x, weight.to(x.dtype).transpose(-2, -1), ends)


class BaseLinear(nn.Module):
    """Stands in for nn.Linear in a block, under the same parameter names; its weight may be in 4 bits."""

    def __init__(self, weight: Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
