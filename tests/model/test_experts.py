"""The expert layer against a loop over experts, values and gradients; LoRA against W + BA."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.linear import grouped_matmul, grouped_matmul_reference

N, K, E, H, I = 50, 3, 8, 16, 12  # noqa: E741


def bank(rank: int, dtype: torch.dtype, seed: int = 0) -> RoutedExperts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype) * 0.3)

    experts = RoutedExperts(draw(E, I, H), draw(E, H, I))
    if rank:
        for name in ("up_proj", "down_proj"):
            experts.add_lora(name, rank, scaling=0.7)
        for name, parameter in experts.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.3
    return experts


def loop_forward(experts: RoutedExperts, hidden, index, weights):
    """Token by token, with W + BA formed."""

    def whole(side: str, expert: int) -> torch.Tensor:
        weight = getattr(experts, f"{side}_proj")[expert]
        if experts.up_lora_A is None:
            return weight
        A, B = getattr(experts, f"{side}_lora_A")[expert], getattr(experts, f"{side}_lora_B")[expert]
        return weight + experts.scalings[side] * B @ A

    rows = []
    for token in range(hidden.shape[0]):
        total = 0
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            inner = torch.relu(whole("up", expert) @ hidden[token]).square()
            total = total + weights[token, slot] * (whole("down", expert) @ inner)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [0, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_and_gradients_equal_a_loop(rank, dtype):
    generator = torch.Generator().manual_seed(1)
    index = torch.stack(
        [torch.randperm(E - 1, generator=generator)[:K] for _ in range(N)]
    )  # expert 7 gets none
    results = []
    for compute in (RoutedExperts.forward, loop_forward):
        experts = bank(rank, dtype)
        hidden = torch.randn(N, H, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        weights = torch.rand(N, K, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        out = compute(experts, hidden, index, weights)
        out.sin().sum().backward()
        results.append([out, hidden.grad, weights.grad, *(p.grad for p in experts.parameters())])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    experts = bank(4, torch.float32)
    index = torch.zeros(5, K, dtype=torch.long)
    experts(torch.randn(5, H), index, torch.rand(5, K)).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad[1:].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul_equals_its_reference(dtype):
    x, matrices = torch.randn(20, H).to(dtype), torch.randn(E, H, 8).to(dtype)
    ends = torch.tensor([0, 5, 5, 9, 20, 20, 20, 20], dtype=torch.int32)
    torch.testing.assert_close(grouped_matmul(x, matrices, ends), grouped_matmul_reference(x, matrices, ends))


class _CountedProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._grouped_mm.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank", "expected"), [(0, 2 + 1 + 2), (4, 6 + 4 + 2 + 2 * 4)])
def test_recomputation_never_takes_the_down_projection_again(rank, expected):
    """Forward, again (up, and what the down factors take in), and backward: the gradient of what came in, and
    with LoRA four products on each side: what comes back through B, and on through A, and of both factors."""
    experts = bank(rank, torch.float32)
    for name in ("up_proj", "down_proj"):
        getattr(experts, name).requires_grad_(False)
    tokens = torch.randn(N, H, requires_grad=True)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    with _CountedProducts() as products:
        checkpoint(experts, tokens, index, torch.rand(N, K), use_reentrant=False).sum().backward()
    assert products.count == expected
