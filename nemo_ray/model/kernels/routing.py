"""The routing of nemo_ray.model.routing as Triton kernels, for one group of experts.

Shapes as there: N tokens, E experts, K experts a token, S = N*K slots, H model size. EP and KP are E and K
padded to powers of 2. Programs of `_choose` are one warp wide, so that a maximum over experts needs no shared
memory.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

from nemo_ray.model.routing import Slots

SCORES = 256  # of a program of `_choose`: two tokens of 128 experts, one of 512
BLOCK = 128  # slots of a program of the sort, which compares each with each
MAX_WIDTH = 1024  # columns of a program that moves rows

GONE = tl.constexpr(-(2**31))  # the key of an expert that is taken or does not exist; no float has it
NAN = tl.constexpr(2**31 - 1)  # the key of NaN, over that of infinity


@triton.jit
def _choose(
    logits, bias, weights, experts, scores, N, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    NORMALIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    start = token.to(tl.int64) * E
    expert = tl.arange(0, EP)[None, :]
    inside = (token < N) & (expert < E)
    choice = tl.sigmoid(tl.load(logits + start + expert, mask=inside, other=0.0))
    choice += tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    # Integers of the same order as the floats: a warp finds the largest integer in one instruction.
    bits = choice.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(choice != choice, NAN, keys)
    keys = tl.where(expert < E, keys, GONE)

    k = tl.arange(0, KP)[None, :]
    chosen = tl.zeros((TOKENS, KP), dtype=tl.int32)
    for rank in range(K):
        best = tl.max(keys, axis=1, keep_dims=True)
        first = tl.min(tl.where(keys == best, expert, EP), axis=1, keep_dims=True)
        chosen = tl.where(k == rank, first, chosen)
        keys = tl.where(expert == first, GONE, keys)

    inside = (token < N) & (k < K)
    score = tl.sigmoid(tl.load(logits + start + chosen, mask=inside, other=0.0))
    weight = score
    if NORMALIZE:
        weight = score / (tl.sum(tl.where(k < K, score, 0.0), axis=1, keep_dims=True) + 1e-20)
    slot = token.to(tl.int64) * K + k
    tl.store(scores + slot, score, mask=inside)
    tl.store(weights + slot, weight * scale, mask=inside)
    tl.store(experts + slot, chosen.to(tl.int64), mask=inside)


@triton.jit
def _choose_backward(
    grad_weights, experts, scores, grad_logits, N, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    NORMALIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    start = token.to(tl.int64) * K
    factor = tl.zeros((TOKENS, 1), dtype=tl.float32) + scale
    mean = tl.zeros((TOKENS, 1), dtype=tl.float32)  # of the gradients, weighted as the experts are
    if NORMALIZE:
        k = tl.arange(0, KP)[None, :]
        inside = (token < N) & (k < K)
        all_grads = tl.load(grad_weights + start + k, mask=inside, other=0.0)
        all_scores = tl.load(scores + start + k, mask=inside, other=0.0)
        total = tl.sum(all_scores, axis=1, keep_dims=True) + 1e-20
        factor /= total
        mean = tl.sum(all_grads * all_scores, axis=1, keep_dims=True) / total

    expert = tl.arange(0, EP)[None, :]
    out = tl.zeros((TOKENS, EP), dtype=tl.float32)
    for rank in range(K):
        chosen = tl.load(experts + start + rank, mask=token < N, other=0).to(tl.int32)
        grad = tl.load(grad_weights + start + rank, mask=token < N, other=0.0)
        score = tl.load(scores + start + rank, mask=token < N, other=0.0)
        out = tl.where(expert == chosen, factor * (grad - mean) * score * (1 - score), out)
    at = grad_logits + token.to(tl.int64) * E + expert
    tl.store(at, out, mask=(token < N) & (expert < E))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = logits.shape
        EP, KP = next_power_of_2(num_experts), next_power_of_2(top_k)
        tokens = max(1, SCORES // EP)
        ctx.grid = (cdiv(num_tokens, tokens),)
        ctx.num_experts, ctx.scale = num_experts, float(scale)
        ctx.sizes = (num_experts, EP, top_k, KP, normalize, tokens)
        weights, scores = (logits.new_empty(num_tokens, top_k) for _ in range(2))
        experts = torch.empty_like(weights, dtype=torch.int64)
        _choose[ctx.grid](
            logits.contiguous(), bias.contiguous(), weights, experts, scores, num_tokens, ctx.scale,
            *ctx.sizes, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(experts, scores)
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return weights, experts

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None, _: None):
        if grad is None:
            return None, None, None, None, None
        experts, scores = ctx.saved_tensors
        out = grad.new_empty(grad.shape[0], ctx.num_experts)
        _choose_backward[ctx.grid](
            grad.contiguous(), experts, scores, out, grad.shape[0], ctx.scale, *ctx.sizes, num_warps=1
        )
        return out, None, None, None, None


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See nemo_ray.model.routing.route."""
    assert num_groups == 1 and logits.dtype == torch.float32
    assert top_k <= logits.shape[1] == bias.numel()
    return _Route.apply(logits, bias, top_k, normalize, scale)


@triton.jit
def _count(experts, counts, S, num_blocks, BLOCK: tl.constexpr):
    """counts[e, block] = slots of expert e in the block, where there are any."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + slot, mask=slot < S, other=-1).to(tl.int32)
    # Sums are over axis 0: a thread holds whole columns.
    count = tl.sum((expert[:, None] == expert[None, :]).to(tl.int32), axis=0)
    # The slots of an expert all write the same.
    tl.store(counts + expert * num_blocks + block, count, mask=slot < S)


@triton.jit
def _place(
    experts, upto, order, back, ends, S, num_blocks,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """upto[e, block]: slots of the experts before e, and of e as far as the end of the block."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    slot = block * BLOCK + i
    expert = tl.load(experts + slot, mask=slot < S, other=-1).to(tl.int32)
    follows = (expert[:, None] == expert[None, :]) & (i[:, None] > i[None, :])
    end = tl.load(upto + expert * num_blocks + block, mask=slot < S, other=0)
    position = (end - 1 - tl.sum(follows.to(tl.int32), axis=0)).to(tl.int64)
    tl.store(back + slot, position, mask=slot < S)
    tl.store(order + position, slot.to(tl.int64), mask=slot < S)
    if block == 0:
        e = tl.arange(0, EP)
        last = tl.load(upto + e * num_blocks + num_blocks - 1, mask=e < E, other=0)
        tl.store(ends + e, last, mask=e < E)


def sort_slots(experts: torch.Tensor, num_experts: int) -> Slots:
    """See nemo_ray.model.routing.sort_slots. A counting sort: blocks count their slots by expert, one running
    sum over (E, blocks) tells where each block's slots of each expert go, and blocks put them there."""
    experts = experts.contiguous()
    S, device = experts.numel(), experts.device
    num_blocks = max(1, cdiv(S, BLOCK))  # one block at least, which writes `ends`
    counts = torch.zeros(num_experts * num_blocks, dtype=torch.int32, device=device)
    _count[(num_blocks,)](experts, counts, S, num_blocks, BLOCK, num_warps=4)
    upto = counts.cumsum(0, dtype=torch.int32)
    order, back = (torch.empty(S, dtype=torch.int64, device=device) for _ in range(2))
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    _place[(num_blocks,)](
        experts, upto, order, back, ends, S, num_blocks,
        num_experts, next_power_of_2(num_experts), BLOCK, num_warps=4,
    )  # fmt: skip
    return Slots(order, back, ends)


@triton.jit
def _spread(x, back, out, H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(x + token * H + column, mask=column < H)
    for k in tl.static_range(K):
        position = tl.load(back + token * K + k)
        tl.store(out + position * H + column, row, mask=column < H)


def spread(x: torch.Tensor, back: torch.Tensor, top_k: int) -> torch.Tensor:
    """See nemo_ray.model.routing.spread. A token is read once, not once for each of its slots."""
    num_tokens, H = x.shape
    out = x.new_empty(back.numel(), H)
    width = min(MAX_WIDTH, next_power_of_2(H))
    grid = (num_tokens, cdiv(H, width))
    _spread[grid](x.contiguous(), back.contiguous(), out, H, top_k, width, num_warps=4)
    return out


@triton.jit
def _combine(
    slots, back, weights, out, H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for k in tl.static_range(K):  # unrolled: many rows are on their way at once
        position = tl.load(back + token * K + k)
        row = tl.load(slots + position * H + column, mask=column < H, other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * K + k).to(tl.float32)
        total += row
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


def combine(
    slots: torch.Tensor,
    back: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """See nemo_ray.model.routing.combine."""
    num_tokens, top_k = back.shape if weights is None else weights.shape
    H = slots.shape[1]
    out = slots.new_empty(num_tokens, H)
    width = min(MAX_WIDTH, next_power_of_2(H))
    _combine[(num_tokens, cdiv(H, width))](
        slots.contiguous(), back.contiguous(),
        None if weights is None else weights.contiguous(),
        out, H, top_k, width, num_warps=4,
    )  # fmt: skip
    return out
