"""Triton: RMSNorm in one pass, and its gradient added to that of the residual path in one pass.

One program a row. Shapes: N tokens, H model size.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(hidden, weight, out, scales, epsilon, H: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < H
    value = tl.load(hidden + row * H + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / H + epsilon)
    normed = value * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _rms_norm_gradient(
    grad,
    grad_residual,
    hidden,
    weight,
    scales,
    out,
    HAS_RESIDUAL: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < H
    at = row * H + columns
    scale = tl.load(scales + row)
    unit = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32) * scale
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    found = scale * (slope - unit * (tl.sum(slope * unit, 0) / H))
    if HAS_RESIDUAL:
        found += tl.load(grad_residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (..., H), contiguous -> normed (..., H), and what each row was scaled by (N,), float32."""
    size = hidden.shape[-1]
    rows = hidden.numel() // size
    out = torch.empty_like(hidden)
    scales = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    width = triton.next_power_of_2(size)
    _rms_norm[(rows,)](hidden, weight, out, scales, epsilon, H=size, WIDTH=width, num_warps=8)
    return out, scales


def rms_norm_gradient(
    grad: torch.Tensor,
    grad_residual: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """The gradient of `hidden` through the norm, plus `grad_residual`; all contiguous, (..., H)."""
    size = hidden.shape[-1]
    out = torch.empty_like(hidden)
    width = triton.next_power_of_2(size)
    _rms_norm_gradient[(scales.numel(),)](
        grad,
        grad_residual,
        hidden,
        weight,
        scales,
        out,
        HAS_RESIDUAL=grad_residual is not None,
        H=size,
        WIDTH=width,
        num_warps=8,
    )
    return out
