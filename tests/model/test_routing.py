"""The routing in torch: upstream's choice, weights and gradients; slots sorted and brought back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from nemo_ray.model import kernels
from nemo_ray.model.routing import bf16_parts, combine, route, router_logits, sort_slots, spread
from tests.model.shapes import tiny_config

N, E, K = 40, 24, 5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(weights: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(N, E): each expert's weight, whatever the order of the choice."""
    return weights.new_zeros(weights.shape[0], num_experts).scatter(1, experts, weights)


def upstream_router(num_groups: int, top_groups: int, normalize: bool) -> NemotronHTopkRouter:
    """The router with an identity for its weight, so that hidden states are logits."""
    config = tiny_config(
        hidden_size=E,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=num_groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
    )
    router = NemotronHTopkRouter(config)
    router.weight.data.copy_(torch.eye(E))
    router.e_score_correction_bias.copy_(draw(E, seed=1) * 0.3)
    return router


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 1), (4, 2), (6, 3), (6, 6)])
def test_choice_weights_and_gradients_are_upstreams(num_groups, top_groups, normalize):
    router = upstream_router(num_groups, top_groups, normalize)
    results = []
    for ours in (False, True):
        logits = draw(N, E).requires_grad_()
        if ours:
            bias = router.e_score_correction_bias
            weights, experts = route(logits, bias, K, num_groups, top_groups, normalize, 2.5)
        else:
            _, weights, experts = router(logits)
        spread_out = dense(weights, experts, E)
        spread_out.sin().sum().backward()
        results.append((experts.sort().values, spread_out, logits.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    chosen_best_of_all = draw(N, E).sigmoid().add(bias).topk(K).indices.sort().values
    assert torch.equal(chosen_best_of_all, results[0][0]) == (num_groups == top_groups), "groups matter"


def test_the_best_comes_first_and_of_equals_the_lower_expert():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    weights, experts = route(logits, torch.zeros(5), 4, 1, 1, False, 1.0)
    assert experts.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]] and experts.dtype == torch.int64
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, experts))
    _, experts = route(torch.zeros(1, 6), torch.tensor([0.0, 0, 1, 0, 1, 0]), 3, 3, 2, True, 1.0)
    assert experts.tolist() == [[2, 4, 3]], "the lower of equal groups too, and of their experts"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 2)])
def test_gradients_of_the_weights_are_exact(num_groups, top_groups, normalize):
    logits = draw(6, 12, dtype=torch.float64).requires_grad_()
    bias = draw(12, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: route(x, bias, 3, num_groups, top_groups, normalize, 2.5)[0], logits
    )


def test_the_bias_steers_the_choice_and_no_weight():
    logits, bias = draw(N, E), torch.zeros(E)
    bias[7] = 10
    weights, experts = route(logits, bias, K, 1, 1, False, 2.0)
    assert (experts[:, 0] == 7).all()
    torch.testing.assert_close(weights[:, 0], 2 * logits[:, 7].sigmoid())


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_slots_are_sorted_stably_and_counted(data):
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k)
    experts = torch.tensor(data.draw(st.lists(rows, max_size=15)), dtype=torch.int64).view(-1, top_k)
    order, back, ends = sort_slots(experts, num_experts)
    flat = experts.flatten().tolist()
    assert order.tolist() == sorted(range(len(flat)), key=lambda slot: flat[slot])
    assert [order.tolist()[position] for position in back.tolist()] == list(range(len(flat)))
    assert ends.tolist() == [sum(e <= expert for e in flat) for expert in range(num_experts)]
    assert (order.dtype, back.dtype, ends.dtype) == (torch.int64, torch.int64, torch.int32)


def test_slots_come_back_to_their_tokens():
    experts = torch.randint(0, E, (N, K), generator=torch.Generator().manual_seed(0))
    slots, x = sort_slots(experts, E), draw(N, 16)
    rows = spread(x, slots.back, K)
    assert torch.equal(rows, x[slots.order // K])
    torch.testing.assert_close(combine(rows, slots.back.view(N, K), None), K * x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_sums_and_rounds_once(dtype, weighted):
    experts = torch.randint(0, E, (N, K), generator=torch.Generator().manual_seed(0))
    slots = sort_slots(experts, E)
    rows, weights = draw(N * K, 16, dtype=dtype), draw(N, K, seed=2)
    # Position by position in float64, without `back`.
    exact = torch.zeros(N, 16, dtype=torch.float64)
    for position, slot in enumerate(slots.order.tolist()):
        weight = weights.flatten()[slot].double() if weighted else 1
        exact[slot // K] += weight * rows[position].double()
    out = combine(rows, slots.back, weights) if weighted else combine(rows, slots.back.view(N, K), None)
    assert out.dtype == dtype
    half_ulp = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(
        out.double(), exact, rtol=1.01 * half_ulp, atol=1e-14 if dtype == torch.float64 else 1e-6
    )


def test_three_bf16_parts_are_a_float32_and_two_are_it_up_to_17_bits():
    values = draw(1000) * torch.logspace(-20, 20, 1000)
    assert torch.equal(torch.stack(bf16_parts(values, 3)).double().sum(0), values.double())
    off = torch.stack(bf16_parts(values, 2)).double().sum(0) - values.double()
    assert (off.abs() <= 2**-17 * values.double().abs()).all()


def router_passes(dtype: torch.dtype, trains: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the tokens."""
    tokens = draw(N, 64, dtype=torch.bfloat16).to(dtype).requires_grad_()
    weight = draw(E, 64, seed=1).to(dtype if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        logits = tokens @ weight.T
    else:
        logits = router_logits(tokens, weight.requires_grad_(trains))
    (logits * draw(N, E, seed=2).to(logits.dtype)).sum().backward()
    return logits.detach(), tokens.grad


def test_logits_of_bf16_tokens_are_those_of_float32(monkeypatch):
    plain, _ = router_passes(torch.bfloat16)
    monkeypatch.setattr(kernels, "serve", lambda tensor: True)  # the way of a GPU
    split, grad = router_passes(torch.bfloat16)
    exact, exact_grad = router_passes(torch.float64)
    assert split.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert not torch.equal(split, plain), "one way only was taken"
    assert (split - exact).norm() <= 2e-7 * exact.norm()
    # Rounding to bf16, once, loses this much of a gradient; a bf16 weight alone would lose half as much more.
    rounded = exact_grad.to(torch.bfloat16)
    assert (grad - exact_grad).norm() <= 1.001 * (rounded - exact_grad).norm()


@pytest.mark.parametrize(("dtype", "trains"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_float32_run_and_a_router_that_trains_take_the_plain_product(dtype, trains, monkeypatch):
    plain = router_passes(dtype, trains)
    monkeypatch.setattr(kernels, "serve", lambda tensor: True)
    assert all(map(torch.equal, plain, router_passes(dtype, trains)))
