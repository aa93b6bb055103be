"""RMSNorm where a block begins: the residual stream goes on beside it.

On a GPU a frozen norm is one kernel each way (kernels/rms_norm.py), which keeps the stream itself and one
number a token, and adds the two gradients that meet here. The torch function is the reference.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model import kernels
from nemo_ray.model.remake import Remake


def rms_norm(hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """What `norm` (a NemotronHRMSNorm) computes, in float32 inside and in hidden's dtype outside."""
    weight = norm.weight
    out = F.rms_norm(hidden.to(weight.dtype), weight.shape, weight, norm.variance_epsilon)
    return out.to(hidden.dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float):
        from nemo_ray.model.kernels import rms_norm as fast

        hidden = hidden.contiguous()
        normed, scales = fast.rms_norm(hidden, weight, epsilon)
        ctx.save_for_backward(hidden, weight, scales)
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), normed

    @staticmethod
    def backward(ctx, grad_residual: torch.Tensor | None, grad: torch.Tensor | None):
        from nemo_ray.model.kernels import rms_norm as fast

        if grad is None:
            return grad_residual, None, None
        if grad_residual is not None:
            grad_residual = grad_residual.contiguous()
        return fast.rms_norm_gradient(grad.contiguous(), grad_residual, *ctx.saved_tensors), None, None


def residual_norm(hidden: torch.Tensor, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., H) -> what goes past the block, `hidden` itself, and what goes into it, its `rms_norm`."""
    weight: torch.Tensor = norm.weight
    if kernels.serve(hidden) and not weight.requires_grad:
        residual, normed = _ResidualNorm.apply(hidden, weight, norm.variance_epsilon)
        return residual, normed
    return hidden, rms_norm(hidden, norm)


def norm_again(hidden: torch.Tensor, norm: nn.Module) -> Remake | None:
    """How what `residual_norm` made of `hidden` comes once more; None for a norm that trains: those beside
    it then do so too, and keep their inputs."""
    return None if norm.weight.requires_grad else Remake((hidden.detach(),), partial(_normed, norm))


def _normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    if kernels.serve(hidden):
        from nemo_ray.model.kernels import rms_norm as fast

        return fast.rms_norm(hidden, norm.weight, norm.variance_epsilon)[0]
    return rms_norm(hidden, norm)
