"""mamba-ssm's fused function between in_proj and out_proj, with how its result comes once more.

It keeps its input and what the scan gave; the gated norm of the two is the result, one kernel away.
"""

from functools import partial
from typing import Any

import torch
from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_fwd
from mamba_ssm.ops.triton.ssd_combined import MambaSplitConv1dScanCombinedFn

from nemo_ray.errors import PatchError
from nemo_ray.model.remake import Remake


class _Scan(torch.autograd.Function):
    """mamba-ssm's own, which hands out what it saved of the scan as well."""

    @staticmethod
    def forward(ctx, zxbcdt: torch.Tensor, *args: Any):
        y = MambaSplitConv1dScanCombinedFn.forward(ctx, zxbcdt, *args)
        scanned = ctx.to_save[3]
        if scanned.numel() != y.numel():
            raise PatchError("mamba-ssm keeps something else where 2.3.2 keeps what the scan gave")
        ctx.mark_non_differentiable(scanned)
        ctx.set_materialize_grads(False)
        return y, scanned

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _: None):
        return MambaSplitConv1dScanCombinedFn.backward(ctx, grad)


def split_conv1d_scan(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    *,
    seq_idx: torch.Tensor | None,
    dt_limit: tuple[float, float],
    activation: str,
    rmsnorm_weight: torch.Tensor,
    rmsnorm_eps: float,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
) -> tuple[torch.Tensor, Remake]:
    """Arguments and first result are those of ssd.split_conv1d_scan."""
    before_norm = (None, seq_idx, dt_limit, False, activation)
    norm = (rmsnorm_weight, rmsnorm_eps, None, None, headdim, ngroups, norm_before_gate)
    y, scanned = _Scan.apply(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, *before_norm, *norm
    )
    make = partial(_gated_norm, epsilon=rmsnorm_eps, groups=ngroups, norm_before_gate=norm_before_gate)
    return y, Remake((zxbcdt.detach(), scanned, rmsnorm_weight.detach()), make)


def _gated_norm(
    zxbcdt: torch.Tensor,
    scanned: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    groups: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    size = weight.numel()
    y, _, _ = _layer_norm_fwd(
        scanned.view(-1, size),
        weight,
        None,
        epsilon,
        zxbcdt[..., :size].flatten(0, -2),
        group_size=size // groups,
        norm_before_gate=norm_before_gate,
        is_rms_norm=True,
    )
    return y.view(*zxbcdt.shape[:-1], size)
