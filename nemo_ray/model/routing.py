"""Which experts a token goes to, and the ways there and back: from tokens to slots sorted by expert, and from
those to tokens again.

On a GPU the functions here are Triton kernels (kernels/routing.py), elsewhere their torch references. Nothing
asks the device for a count, nothing is added by atomics: the same input gives the same bits.

Shapes: N tokens, E experts, K experts a token, S = N*K slots (slot n*K + k is token n's k-th), H model (or
latent) size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nemo_ray.model import kernels


class Slots(NamedTuple):
    """The slots sorted by expert, those of an expert in their own order."""

    order: torch.Tensor  # (S,) int64, the slot at each sorted position
    back: torch.Tensor  # (S,) int64, the sorted position of each slot
    ends: torch.Tensor  # (E,) int32, the sorted position where an expert's slots end


def router_logits(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tokens (N, H) times the router's weight (E, H), both taken as float32, giving (N, E) float32.

    A GPU's tensor cores take no float32. But bf16 tokens times the bf16 parts of a frozen weight, summed in
    float32, are the same: no product of two bf16 is rounded there.
    """
    if kernels.serve(tokens) and tokens.dtype == torch.bfloat16 and not weight.requires_grad:
        return _SplitProduct.apply(tokens, weight)
    return F.linear(tokens.float(), weight.float())


class _SplitProduct(torch.autograd.Function):
    """The product on tensor cores: a float32 is the sum of three bf16, and of two up to 2^-17 of it, which is
    enough for a gradient that is rounded to bf16."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        stacked = torch.cat(bf16_parts(weight, 3))  # (3 E, H)
        return _float32_matmul(tokens, stacked.T).unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (grad_high, grad_low), (high, low) = bf16_parts(grad, 2), bf16_parts(ctx.weight, 2)
        return torch.cat([grad_high, grad_high, grad_low], 1) @ torch.cat([high, low, high]), None


def bf16_parts(values: torch.Tensor, count: int) -> list[torch.Tensor]:
    """bf16 tensors that add up to `values`: of a float32 the first 8 `count` bits, all of them with 3."""
    parts, left = [], values.float()
    for _ in range(count - 1):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1]
    return [*parts, left.to(torch.bfloat16)]


def _float32_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product of two bf16 matrices, summed and left in float32."""
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts by sigmoid(logits) + bias, and weigh them by sigmoid(logits).

    Args:
        logits: (N, E) float32; the only ones that get a gradient.
        bias: (E,), which steers the choice alone.
        num_groups: the experts stand in so many groups of one size; only `top_groups` of them, those with the
            largest sums of their two best, are chosen from.
        normalize: divide a token's weights by their sum.
        scale: factor of all weights.

    Returns: weights (N, K) in logits' dtype and experts (N, K) int64, the best choice first, of equals the
    lower expert. A NaN counts as best, so that it reaches the loss.
    Source: NemotronHTopkRouter in transformers; DeepSeek-AI, "DeepSeek-V3" (2024), section 2.1.2.
    """
    if kernels.serve(logits) and num_groups == 1:
        from nemo_ray.model.kernels import routing as fast

        return fast.route(logits, bias, top_k, num_groups, top_groups, normalize, scale)
    return route_reference(logits, bias, top_k, num_groups, top_groups, normalize, scale)


def route_reference(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in torch, for any number of groups and any dtype."""
    scores = logits.sigmoid()
    choice = scores.detach() + bias
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        sums = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, _best(sums, top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    experts = _best(choice, top_k)
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, experts


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (N, count) of the largest in each row of values (N, ...), largest first, of equals the first;
    topk promises no order of equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def sort_slots(experts: torch.Tensor, num_experts: int) -> Slots:
    """Sort the slots of experts (N, K) by expert, those of an expert in their own order."""
    if kernels.serve(experts):
        from nemo_ray.model.kernels import routing as fast

        return fast.sort_slots(experts, num_experts)
    return sort_slots_reference(experts, num_experts)


def sort_slots_reference(experts: torch.Tensor, num_experts: int) -> Slots:
    """`sort_slots` in torch."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return Slots(order, back, counts.cumsum(0, dtype=torch.int32))


def spread(x: torch.Tensor, back: torch.Tensor, top_k: int) -> torch.Tensor:
    """Copy tokens x (N, H) to the sorted positions `back` (S,) of their slots, giving (S, H): the same as
    x[order // top_k]. Not differentiable; its gradient is `combine` without weights."""
    if kernels.serve(x):
        from nemo_ray.model.kernels import routing as fast

        return fast.spread(x, back, top_k)
    return spread_reference(x, back, top_k)


def spread_reference(x: torch.Tensor, back: torch.Tensor, top_k: int) -> torch.Tensor:
    """`spread` in torch."""
    out = x.new_empty(back.numel(), x.shape[1])
    out[back.view(-1, top_k)] = x.unsqueeze(1)
    return out


def combine(
    slots: torch.Tensor,
    back: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """Sum each token's slots (S, H), which stand sorted, times their weights: over k, weights[n, k] *
    slots[back[n, k]], summed in float32 and rounded once, giving (N, H) in slots' dtype.

    Not differentiable.

    Args:
        back: (S,) sorted positions, or (N, K) of them where there are no weights to tell K by.
        weights: (N, K), or None for ones.
    """
    if kernels.serve(slots):
        from nemo_ray.model.kernels import routing as fast

        return fast.combine(slots, back, weights)
    return combine_reference(slots, back, weights)


def combine_reference(
    slots: torch.Tensor,
    back: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """`combine` in torch; float64 stays float64."""
    shape = back.shape if weights is None else weights.shape
    wide = torch.promote_types(slots.dtype, torch.float32)
    rows = slots[back.view(shape)].to(wide)  # (N, K, H)
    if weights is not None:
        rows = rows.mul_(weights.unsqueeze(-1))
    return rows.sum(dim=1).to(slots.dtype)
