"""The activation of every MLP and expert of Nemotron-H, relu(x)^2, which keeps nothing but x.

A GPU runs it in one pass each way (kernels/relu_squared.py); the torch functions here are the reference.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model import kernels


def relu_squared_reference(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2, of any shape."""
    return F.relu(x).square_()


def relu_squared_gradient_reference(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x where `grad` is that of relu(x)^2; new memory."""
    return F.relu(x).mul_(grad).mul_(2)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2, of any shape. Not differentiable: see `ReluSquared`."""
    if kernels.serve(x):
        from nemo_ray.model.kernels import relu_squared as fast

        return fast.relu_squared(x.contiguous())
    return relu_squared_reference(x)


def relu_squared_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x where `grad` is that of relu(x)^2; new memory."""
    if kernels.serve(x):
        from nemo_ray.model.kernels import relu_squared as fast

        return fast.relu_squared_gradient(grad.contiguous(), x.contiguous())
    return relu_squared_gradient_reference(grad, x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return relu_squared(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return relu_squared_gradient(grad, x)


class ReluSquared(nn.Module):
    """relu(x)^2 as a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return _ReluSquared.apply(x)
