"""The routed experts: grouped matmuls over tokens sorted by expert, and LoRA as two more on the factors.

W + BA is never formed: an adapter costs its own rank, not a copy of the bank. No token is dropped, and
nothing asks the device for a count. A forward pass leaves to the backward pass the tokens (or what they are
made of again), the up projection's output and what A made of its inputs: all else is gathered or multiplied
again, and the down projection never.

Shapes: N tokens, K experts a token, S = N*K slots, E experts, H model (or latent) size, I expert size,
O outputs, R rank.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model import kernels
from nemo_ray.model.activation import relu_squared
from nemo_ray.model.linear import Deferred, Weight, grouped_matmul, grouped_outer, stand_in, whole
from nemo_ray.model.quant import QuantizedWeight
from nemo_ray.model.remake import Remake, unchanged
from nemo_ray.model.routing import Slots, combine, sort_slots, spread

ROW_BYTES = 16  # torch's grouped matmul wants rows of a multiple of 16 bytes


def add_factors_reference_(
    out: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Add to `out` (S, O) in place, rows sorted by expert, `inner` (S, R) times their expert's factors."""
    return out.add_(grouped_matmul(inner, factors.transpose(-2, -1), ends))


def activation_gradient_reference_(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    inner: torch.Tensor | None,
    factors: torch.Tensor | None,
    ends: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """From the gradient of relu(hidden)^2 before the routing weights to that of `hidden`, in place of `grad`.

    Args:
        grad: (S, I), of the base; `inner` (S, R) and `factors` (E, I, R) add the adapter's, or are None.
        hidden: (S, I).
        weights: (S,) float32, by which a slot's output was multiplied.
        keep: whether relu(hidden)^2 is wanted.

    Returns: relu(hidden)^2 (S, I) or None, and the gradients of `weights` (S,) in float32 or more.
    """
    if inner is not None and factors is not None:
        add_factors_reference_(grad, inner, factors, ends)
    compute = torch.promote_types(grad.dtype, torch.float32)
    relu = F.relu(hidden)
    activated = relu.square()
    dots = (activated.to(compute) * grad.to(compute)).sum(-1)
    grad.mul_(relu).mul_(2 * weights.to(grad.dtype).unsqueeze(-1))
    return activated if keep else None, dots


def add_factors_(
    out: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`add_factors_reference_`, by its kernel on a GPU."""
    if kernels.serve(out):
        from nemo_ray.model.kernels import grouped_lora

        return grouped_lora.add_factors_(out, inner, factors, ends)
    return add_factors_reference_(out, inner, factors, ends)


def activation_gradient_(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    inner: torch.Tensor | None,
    factors: torch.Tensor | None,
    ends: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`activation_gradient_reference_`, by its kernel on a GPU."""
    if kernels.serve(grad):
        from nemo_ray.model.kernels import grouped_lora

        return grouped_lora.activation_gradient_(grad, hidden, weights, inner, factors, ends, keep)
    return activation_gradient_reference_(grad, hidden, weights, inner, factors, ends, keep)


class _Bank:
    """One side of the experts, "up" or "down", for products in one dtype: its weight and LoRA factors."""

    def __init__(self, experts: "RoutedExperts", side: str, dtype: torch.dtype) -> None:
        self.weight: Weight = getattr(experts, f"{side}_proj")
        self.scaling = experts.scalings[side]
        A, B = getattr(experts, f"{side}_lora_A"), getattr(experts, f"{side}_lora_B")
        self.has_lora = A is not None
        if self.has_lora:
            self.rank, self.trained = A.shape[1], A.dtype
            padding = -self.rank % (ROW_BYTES // dtype.itemsize)
            self.A = F.pad(A.to(dtype), (0, 0, 0, padding)) if padding else A.to(dtype)  # (E, R, inputs)
            self.B = F.pad(B.to(dtype), (0, padding)) if padding else B.to(dtype)  # (E, outputs, R)

    def inner(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """scaling * A x, (S, R)."""
        return grouped_matmul(x, self.A.transpose(-2, -1), ends) * self.scaling

    def inner_gradient(self, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The gradient of A x, (S, R)."""
        return grouped_matmul(grad, self.B, ends) * self.scaling

    def project(self, x: torch.Tensor, inner: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
        """(S, inputs) and what `inner` made of them -> (S, outputs)."""
        out = grouped_matmul(x, whole(self.weight, x.dtype).transpose(-2, -1), ends)
        return out if inner is None else add_factors_(out, inner, self.B, ends)

    def a_gradient(self, grad_inner: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(E, R, inputs), from the gradient of A x (S, R) and x (S, inputs)."""
        return grouped_outer(grad_inner, x, ends)[:, : self.rank].to(self.trained)

    def b_gradient(self, grad: torch.Tensor, inner: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(E, outputs, R), from the gradient of the output (S, outputs) and scaling * A x (S, R)."""
        return grouped_outer(grad, inner, ends)[:, :, : self.rank].to(self.trained)


class _UpGradient(torch.autograd.Function):
    """Tokens (N, H) to the up projection's output at their slots (S, I)."""

    @staticmethod
    def forward(ctx, tokens, weight, lora_A, lora_B, experts: "RoutedExperts", slots: Slots, again: Remake):
        bank = _Bank(experts, "up", tokens.dtype)
        x = at_slots(tokens, slots)
        inner = bank.inner(x, slots.ends) if bank.has_lora else None
        ctx.save_for_backward(weight, inner, *again.sources)
        ctx.experts, ctx.slots, ctx.make, ctx.shape = experts, slots, again.make, tokens.shape
        ctx.mark_non_differentiable(*(t for t in (x, inner) if t is not None))
        ctx.set_materialize_grads(False)  # or zeros would be made for these two
        return stand_in(x, x.shape[0], experts.up_proj.shape[1]), x, inner

    @staticmethod
    def backward(ctx, grad: torch.Tensor, *_: None):
        weight, inner, *sources = ctx.saved_tensors
        slots, ends = ctx.slots, ctx.slots.ends
        bank = _Bank(ctx.experts, "up", grad.dtype)
        grad_weight = grad_A = grad_B = grad_inner = None
        if bank.has_lora or ctx.needs_input_grad[1]:
            x = at_slots(ctx.make(*sources).view(ctx.shape), slots)
            if bank.has_lora:
                grad_inner = bank.inner_gradient(grad, ends)
                grad_A = bank.a_gradient(grad_inner, x, ends)
                grad_B = bank.b_gradient(grad, inner, ends)
            if ctx.needs_input_grad[1]:
                grad_weight = grouped_outer(grad, x, ends).to(weight.dtype)
            del x
        grad_tokens = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_matmul(grad, whole(bank.weight, grad.dtype), ends)
            if bank.has_lora:
                add_factors_(grad_x, grad_inner, bank.A.transpose(-2, -1), ends)
            grad_tokens = combine(grad_x, slots.back.view(ctx.shape[0], -1), None)
        return grad_tokens, grad_weight, grad_A, grad_B, None, None, None


class _DownGradient(torch.autograd.Function):
    """The up projection's output (S, I) to tokens (N, H): activation, down projection, weighted sum.

    A slot's routing weight is applied to its gradient after the down projection: so the weight's own gradient
    is a product with what came in, and the slot's output is needed by nobody.
    """

    @staticmethod
    def forward(ctx, hidden, weights, weight, lora_A, lora_B, experts: "RoutedExperts", slots: Slots):
        bank = _Bank(experts, "down", hidden.dtype)
        # Without factors only the product needs it, and recomputation takes none.
        activated = relu_squared(hidden) if bank.has_lora else None
        inner = None if activated is None else bank.inner(activated, slots.ends)
        ctx.save_for_backward(hidden, weights, weight, inner)
        ctx.experts, ctx.slots = experts, slots
        ctx.mark_non_differentiable(*(t for t in (activated, inner) if t is not None))
        ctx.set_materialize_grads(False)
        return stand_in(hidden, weights.shape[0], experts.down_proj.shape[1]), activated, inner

    @staticmethod
    def backward(ctx, grad: torch.Tensor, *_: None):
        hidden, weights, weight, inner = ctx.saved_tensors
        slots, ends = ctx.slots, ctx.slots.ends
        bank = _Bank(ctx.experts, "down", hidden.dtype)
        grad_out = at_slots(grad, slots)
        at_sorted = weights.flatten()[slots.order]
        scale = at_sorted.to(grad.dtype).unsqueeze(-1)
        grad_hidden = grouped_matmul(grad_out, whole(bank.weight, grad.dtype), ends)
        grad_weight = grad_A = grad_B = grad_inner = factors = None
        if bank.has_lora:
            grad_inner, factors = bank.inner_gradient(grad_out, ends), bank.A.transpose(-2, -1)
            grad_B = bank.b_gradient(grad_out, inner * scale, ends)
        if not ctx.needs_input_grad[2]:
            del grad_out  # the largest of all, and the activation comes next
        keep = bank.has_lora or ctx.needs_input_grad[2]
        activated, dots = activation_gradient_(
            grad_hidden, hidden, at_sorted, grad_inner, factors, ends, keep
        )
        grad_weights = dots[slots.back].view_as(weights).to(weights.dtype)
        if bank.has_lora:
            grad_A = bank.a_gradient(grad_inner * scale, activated, ends)
        if ctx.needs_input_grad[2]:
            grad_weight = grouped_outer(grad_out, activated.mul_(scale), ends).to(weight.dtype)
        return grad_hidden, grad_weights, grad_weight, grad_A, grad_B, None, None


def at_slots(tokens: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Rows of tokens (N, H) at their slots, sorted by expert, (S, H)."""
    return spread(tokens, slots.back, slots.back.numel() // tokens.shape[0])


class RoutedExperts(nn.Module):
    """Replaces transformers' NemotronHExperts: same parameter names, same call, and room for LoRA factors.

    The banks `up_proj` (E, I, H) and `down_proj` (E, H, I) may be in 4 bits. LoRA on `up_proj` adds
    `up_lora_A` (E, R, H) and `up_lora_B` (E, I, R); on `down_proj` `down_lora_A` (E, R, I) and `down_lora_B`
    (E, H, R).
    """

    def __init__(self, up_proj: Weight, down_proj: Weight) -> None:
        super().__init__()
        self.num_experts = up_proj.shape[0]
        self.up_proj, self.down_proj = up_proj, down_proj
        self.scalings = {"up": 0.0, "down": 0.0}
        # (E,) int64: where experts' slots end, summed over passes of training; balance.py sets it back. It is
        # a sum of counts, so that one addition in place counts all of them, also in a CUDA graph.
        self.counted_ends: torch.Tensor | None = None
        for name in ("up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B"):
            self.register_parameter(name, None)

    def add_lora(self, parameter: str, rank: int, scaling: float) -> None:
        """Put factors of `rank` on `parameter` ("up_proj" or "down_proj")."""
        weight: Weight = getattr(self, parameter)
        experts, out_features, in_features = weight.shape
        side = parameter.removesuffix("_proj")
        device = next(self.parameters()).device
        self.scalings[side] = scaling
        for name, shape in (("A", (experts, rank, in_features)), ("B", (experts, out_features, rank))):
            factor = torch.empty(shape, device=device, dtype=torch.float32)
            setattr(self, f"{side}_lora_{name}", nn.Parameter(factor))

    def forward(
        self,
        tokens: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        again: Remake | None = None,
    ) -> torch.Tensor:
        """tokens (N, H), top_k_index and top_k_weights (N, K) -> (N, H). Keeps the tokens only where they are
        not made `again`."""
        slots = sort_slots(top_k_index, self.num_experts)
        if self.training:
            self._count(slots)
        again = again or unchanged(tokens)
        product, x, inner = _UpGradient.apply(tokens, *self._trained("up"), self, slots, again)
        hidden = Deferred.apply(product, partial(self._project, "up", x, inner, slots))
        del x, inner  # what nothing needs again makes room at once: rows of slots are the largest tensors
        product, activated, inner = _DownGradient.apply(
            hidden, top_k_weights, *self._trained("down"), self, slots
        )
        source, is_activated = (hidden, False) if activated is None else (activated, True)
        del hidden, activated

        def combined() -> torch.Tensor:
            x = source if is_activated else relu_squared(source)
            return combine(self._project("down", x, inner, slots), slots.back, top_k_weights)

        return Deferred.apply(product, combined)

    def _count(self, slots: Slots) -> None:
        if self.counted_ends is None:
            self.counted_ends = torch.zeros(self.num_experts, dtype=torch.int64, device=slots.ends.device)
        self.counted_ends.add_(slots.ends)

    def _trained(self, side: str) -> tuple[torch.Tensor | None, ...]:
        weight = getattr(self, f"{side}_proj")
        dense = None if isinstance(weight, QuantizedWeight) else weight
        return dense, getattr(self, f"{side}_lora_A"), getattr(self, f"{side}_lora_B")

    def _project(self, side: str, x: torch.Tensor, inner: torch.Tensor | None, slots: Slots) -> torch.Tensor:
        return _Bank(self, side, x.dtype).project(x, inner, slots.ends)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, up_proj {tuple(self.up_proj.shape)}"
