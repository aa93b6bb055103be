"""The routed experts: grouped matmuls over tokens sorted by expert, and LoRA as two more on the factors.

W + BA is never formed: an adapter costs its own rank, not a copy of the bank. No token is dropped, and
nothing asks the device for a count.

Shapes: N tokens, K experts a token, S = N*K slots, E experts, H model (or latent) size, I expert size,
R rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

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


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` as a loop over experts, for any dtype."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, ends.tolist(), weight, strict=True)])


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x (S, in), sorted by expert, times their expert's weight (E, out, in), giving (S, out)."""
    if x.dtype == torch.float64:  # torch._grouped_mm has no float64
        return grouped_linear_reference(x, weight, ends)
    return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)


class RoutedExperts(nn.Module):
    """Replaces transformers' NemotronHExperts: same parameter names, same call, and room for LoRA factors.

    LoRA on `up_proj` (E, I, H) adds `up_lora_A` (E, R, H) and `up_lora_B` (E, I, R); on `down_proj` (E, H, I)
    `down_lora_A` (E, R, I) and `down_lora_B` (E, H, R).
    """

    def __init__(self, up_proj: nn.Parameter, down_proj: nn.Parameter) -> None:
        super().__init__()
        self.num_experts = up_proj.shape[0]
        self.up_proj, self.down_proj = up_proj, down_proj
        self.rank, self.scaling = 0, 0.0
        for name in ("up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B"):
            self.register_parameter(name, None)

    def add_lora(self, parameter: str, rank: int, scaling: float) -> None:
        """Put factors of `rank` on `parameter` ("up_proj" or "down_proj")."""
        weight: nn.Parameter = getattr(self, parameter)
        experts, out_features, in_features = weight.shape
        side = parameter.removesuffix("_proj")
        make = {"device": weight.device, "dtype": torch.float32}
        self.rank, self.scaling = rank, scaling
        setattr(self, f"{side}_lora_A", nn.Parameter(torch.empty(experts, rank, in_features, **make)))
        setattr(self, f"{side}_lora_B", nn.Parameter(torch.empty(experts, out_features, rank, **make)))

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden (N, H), top_k_index and top_k_weights (N, K) -> (N, H)."""
        num_tokens, top_k = top_k_index.shape
        order, ends = dispatch(top_k_index, self.num_experts)
        x = hidden[order // top_k]
        up = self._project(x, self.up_proj, self.up_lora_A, self.up_lora_B, ends)
        down = self._project(F.relu(up).square(), self.down_proj, self.down_lora_A, self.down_lora_B, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        slots = down[back].view(num_tokens, top_k, -1)
        return (slots * top_k_weights.to(slots.dtype).unsqueeze(-1)).sum(dim=1)

    def _project(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor | None,
        lora_B: torch.Tensor | None,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        out = grouped_linear(x, weight, ends)
        if lora_A is None or lora_B is None:
            return out
        padding = -self.rank % (ROW_BYTES // x.element_size())
        inner = grouped_linear(x, F.pad(lora_A.to(x.dtype), (0, 0, 0, padding)), ends)
        return out + grouped_linear(inner * self.scaling, F.pad(lora_B.to(x.dtype), (0, padding)), ends)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, rank={self.rank}"
