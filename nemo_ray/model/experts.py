"""The routed experts: grouped matmuls over tokens sorted by expert, and LoRA as two more on the factors.

W + BA is never formed: an adapter costs its own rank, not a copy of the bank. No token is dropped, and
nothing asks the device for a count.

Shapes: N tokens, K experts a token, S = N*K slots, E experts, H model (or latent) size, I expert size,
R rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model.linear import Weight, grouped_linear

ROW_BYTES = 16  # torch's grouped matmul wants rows of a multiple of 16 bytes


def dispatch(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the slots by expert.

    Args:
        top_k_index: (N, K) chosen experts.

    Returns: order (S,), the slot at each sorted position, and ends (E,) int32, where an expert's slots end.
    """
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
    return order, counts.cumsum(0, dtype=torch.int32)


class _ToSlots(torch.autograd.Function):
    """Tokens (N, H) to the rows of their sorted slots (S, H). The gradient gathers too: nothing is added by
    atomics, and a sum has one order."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (back,) = ctx.saved_tensors
        return grad[back].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _ReluSquared(torch.autograd.Function):
    """relu(x)^2, of which only x is kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(grad).mul_(2)


class _Combine(torch.autograd.Function):
    """Sorted slots (S, H) and weights (N, K) to tokens (N, H): sum over k of weight times slot.

    The slots are kept as they came, and nothing of their size beside their gradient is made for it.
    """

    @staticmethod
    def forward(ctx, slots: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, back: torch.Tensor):
        ctx.save_for_backward(slots, weights, order)
        unsorted = slots[back].unflatten(0, weights.shape)
        return torch.bmm(weights.unsqueeze(1), unsorted).squeeze(1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        slots, weights, order = ctx.saved_tensors
        grad_slots = grad[order // weights.shape[1]]
        grad_weights = torch.empty_like(weights.flatten())
        grad_weights[order] = torch.bmm(slots.unsqueeze(1), grad_slots.unsqueeze(2)).flatten()
        grad_slots.mul_(weights.flatten()[order].unsqueeze(1))
        return grad_slots, grad_weights.view_as(weights), None, None


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
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden (N, H), top_k_index and top_k_weights (N, K) -> (N, H)."""
        top_k = top_k_index.shape[1]
        order, ends = dispatch(top_k_index, self.num_experts)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        up = self._project("up", _ToSlots.apply(hidden, order, back, top_k), ends)
        down = self._project("down", _ReluSquared.apply(up), ends)
        return _Combine.apply(down, top_k_weights.to(down.dtype), order, back)

    def _project(self, side: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        out = grouped_linear(x, getattr(self, f"{side}_proj"), ends)
        lora_A, lora_B = getattr(self, f"{side}_lora_A"), getattr(self, f"{side}_lora_B")
        if lora_A is None:
            return out
        padding = -lora_A.shape[1] % (ROW_BYTES // x.element_size())
        inner = grouped_linear(x, F.pad(lora_A.to(x.dtype), (0, 0, 0, padding)), ends)
        inner = inner * self.scalings[side]
        return out.add_(grouped_linear(inner, F.pad(lora_B.to(x.dtype), (0, padding)), ends))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, up_proj {tuple(self.up_proj.shape)}"
