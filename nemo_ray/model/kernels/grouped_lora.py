"""Triton: the product with an adapter's second factor, added where the base's product lies already.

A base bank's grouped matmul writes (S, O) rows sorted by expert; LoRA adds `inner @ factors[expert].T` to
them. As a matmul of its own that writes and reads another (S, O); here it is read, added to and written once.
The gradient of the activation can ride along.

Shapes: S rows sorted by expert, E experts, O outputs, R rank.
"""

import torch
import triton
import triton.language as tl

BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
SPAN = 512  # columns of a program that adds, of BLOCK_COLUMNS at a time
NUM_WARPS = 4
MIN_RANK = 16  # of a tensor core's product


@triton.jit
def _rows_of_tile(ends, num_experts, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile of rows, its first row and where its expert's rows end; E where there is none."""
    experts = tl.arange(0, EXPERTS)
    end = tl.load(ends + experts, mask=experts < num_experts, other=0)
    start = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < num_experts), other=0)
    tiles = tl.where(experts < num_experts, (end - start + ROWS - 1) // ROWS, 0)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    mine = experts == expert
    before = tl.sum(tl.where(mine, until - tiles, 0), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + (tile - before) * ROWS
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _add_factors(
    out,
    inner,
    factors,
    ends,
    hidden,
    weights,
    activated,
    dots,
    num_experts,
    num_columns,
    span,
    rank,
    inner_stride,
    expert_stride,
    column_stride,
    rank_stride,
    HAS_FACTORS: tl.constexpr,
    ACTIVATION_GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, end = _rows_of_tile(ends, num_experts, tl.program_id(0), EXPERTS, ROWS)
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, ROWS)
    here = rows < end
    ranks = tl.arange(0, RANK)
    offsets = rows.to(tl.int64)[:, None] * num_columns
    if HAS_FACTORS:
        inner_at = inner + rows.to(tl.int64)[:, None] * inner_stride + ranks[None, :]
        left = tl.load(inner_at, mask=here[:, None] & (ranks < rank)[None, :], other=0.0)
        mine = factors + expert.to(tl.int64) * expert_stride + ranks[:, None] * rank_stride
    if ACTIVATION_GRADIENT:
        weight = tl.load(weights + rows, mask=here, other=0.0)
        dot = tl.zeros((ROWS,), tl.float32)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = here[:, None] & (columns < num_columns)[None, :]
        at = offsets + columns[None, :]
        value = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            right = tl.load(
                mine + columns[None, :] * column_stride,
                mask=(ranks < rank)[:, None] & (columns < num_columns)[None, :],
                other=0.0,
            )
            value += tl.dot(left, right, input_precision="ieee")
        if ACTIVATION_GRADIENT:
            relu = tl.maximum(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), 0.0)
            squared = (relu * relu).to(hidden.dtype.element_ty)
            if KEEP:
                tl.store(activated + at, squared, mask=inside)
            dot += tl.sum(squared.to(tl.float32) * value, 1)
            value = 2.0 * relu * value * weight[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    if ACTIVATION_GRADIENT:
        tl.store(dots + rows, dot, mask=here)


def _launch(
    out: torch.Tensor,
    inner: torch.Tensor | None,
    factors: torch.Tensor | None,
    ends: torch.Tensor,
    gradient_of: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor] | None,
) -> None:
    num_rows, num_columns = out.shape
    assert out.is_contiguous() and (inner is None or inner.stride(-1) == 1)
    rank = 0 if factors is None else factors.shape[2]
    hidden, weights, activated, dots = gradient_of or (None, None, None, None)
    # An expert's last tile may be a part: at most one tile more for each than the rows alone need.
    num_tiles = triton.cdiv(num_rows, BLOCK_ROWS) + ends.numel()
    # A row's dot product is one program's.
    span = SPAN if gradient_of is None else triton.cdiv(num_columns, BLOCK_COLUMNS) * BLOCK_COLUMNS
    _add_factors[(num_tiles, triton.cdiv(num_columns, span))](
        out,
        inner,
        factors,
        ends,
        hidden,
        weights,
        activated,
        dots,
        ends.numel(),
        num_columns,
        span,
        rank,
        0 if inner is None else inner.stride(0),
        *(factors.stride() if factors is not None else (0, 0, 0)),
        HAS_FACTORS=factors is not None,
        ACTIVATION_GRADIENT=gradient_of is not None,
        KEEP=activated is not None,
        EXPERTS=triton.next_power_of_2(ends.numel()),
        RANK=max(MIN_RANK, triton.next_power_of_2(rank)),
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        num_warps=NUM_WARPS,
    )


def add_factors_(
    out: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """experts.py's function of the same name."""
    _launch(out, inner, factors, ends, None)
    return out


def activation_gradient_(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    inner: torch.Tensor | None,
    factors: torch.Tensor | None,
    ends: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """experts.py's function of the same name."""
    activated = torch.empty_like(hidden) if keep else None
    dots = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    _launch(grad, inner, factors, ends, (hidden.contiguous(), weights, activated, dots))
    return activated, dots
