"""The routing kernels against their torch references: values, gradients, and sizes that fit no block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.model import kernels as package
from nemo_ray.model import routing
from nemo_ray.model.kernels import routing as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = settings(max_examples=25, deadline=None)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_experts(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_experts, (num_tokens, top_k), generator=generator).to(DEVICE)


def routed(compute, logits: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool):
    """Experts, weights and the gradient of logits, of a loss that tells the weights apart."""
    logits = logits.clone().requires_grad_()
    weights, experts = compute(logits, bias, top_k, 1, 1, normalize, 2.5)
    (weights.sin() * torch.arange(1, top_k + 1, device=DEVICE)).sum().backward()
    return experts, weights.detach(), logits.grad


def assert_routed_alike(logits: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool) -> None:
    ours = routed(kernels.route, logits, bias, top_k, normalize)
    plain = routed(routing.route_reference, logits, bias, top_k, normalize)
    assert torch.equal(ours[0], plain[0])
    for value, wanted in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@FEW
@given(st.data())
def test_route_equals_its_reference(data):
    num_tokens, num_experts = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    top_k = data.draw(st.integers(1, min(num_experts, 9)))
    logits = draw(num_tokens, num_experts, seed=data.draw(st.integers(0, 99)))
    bias = draw(num_experts, seed=1)
    if data.draw(st.booleans()):  # many equal choices
        logits, bias = logits.round(), torch.zeros_like(bias)
    assert_routed_alike(logits, bias, top_k, data.draw(st.booleans()))


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 6), (512, 22), (130, 130)])
def test_route_at_the_sizes_of_real_models(num_experts, top_k):
    assert_routed_alike(draw(3, num_experts), draw(num_experts, seed=1) * 0.1, top_k, True)


def test_route_survives_what_is_no_number():
    """A step gone wrong must reach the loss as NaN, and no memory outside the bank."""
    logits = draw(4, 6)
    logits[0, 2], logits[1] = float("nan"), float("nan")
    logits[2, :5], logits[3, 1] = -float("inf"), float("inf")
    bias = torch.zeros(6, device=DEVICE)
    bias[4], bias[5] = -float("inf"), -torch.tensor(float("nan"))  # a NaN with its sign set
    assert_routed_alike(logits, bias, 6, True)


def test_route_takes_strided_logits_and_gradients_and_a_bf16_bias():
    bias = draw(10, seed=1, dtype=torch.bfloat16)
    assert_routed_alike(draw(10, 7).t(), bias, 3, True)
    logits = draw(7, 10).requires_grad_()
    weights, experts = kernels.route(logits, bias, 3, 1, 1, False, 2)
    assert weights.requires_grad and not experts.requires_grad
    weights.sum().backward()  # a gradient without strides
    score = weights.detach() / 2
    wanted = torch.zeros_like(logits).scatter(1, experts, 2 * score * (1 - score))
    torch.testing.assert_close(logits.grad, wanted)


def test_route_saves_only_what_was_chosen():
    saved = []
    logits = draw(7, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        kernels.route(logits, draw(100), 3, 1, 1, True, 2.5)
    assert saved == [(7, 3), (7, 3)]


def assert_sorted_alike(experts: torch.Tensor, num_experts: int) -> None:
    ours = kernels.sort_slots(experts, num_experts)
    for value, wanted in zip(ours, routing.sort_slots_reference(experts, num_experts), strict=True):
        assert torch.equal(value, wanted) and value.dtype == wanted.dtype


@FEW
@given(st.data())
def test_sort_equals_its_reference(data):
    num_tokens, top_k = data.draw(st.integers(0, 150)), data.draw(st.integers(1, 5))
    num_experts = data.draw(st.integers(1, 40))
    used = data.draw(st.integers(1, num_experts))  # the experts above get nothing
    experts = draw_experts(num_tokens, top_k, used, seed=data.draw(st.integers(0, 99)))
    assert_sorted_alike(experts, num_experts)


@pytest.mark.parametrize("expert", [0, 3, 6])
def test_sort_of_slots_that_all_go_to_one_expert(expert):
    assert_sorted_alike(torch.full((2 * kernels.BLOCK, 2), expert, device=DEVICE), 7)


def test_sort_at_the_sizes_of_real_models():
    assert_sorted_alike(draw_experts(100, 22, 512), 512)
    assert_sorted_alike(draw_experts(1, 6, 128), 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "width"), [(5, 3, 64), (1, 1, 16), (3, 22, 24), (2, 2, 1500), (0, 2, 16)]
)
def test_rows_move_as_in_the_references(num_tokens, top_k, width, dtype):
    slots = routing.sort_slots_reference(draw_experts(num_tokens, top_k, 9), 9)
    x = draw(num_tokens, width, dtype=dtype)
    assert torch.equal(kernels.spread(x, slots.back, top_k), routing.spread_reference(x, slots.back, top_k))

    rows, weights = draw(num_tokens * top_k, width, seed=1, dtype=dtype), draw(num_tokens, top_k, seed=2)
    for back, factors in ((slots.back, weights), (slots.back.view(num_tokens, top_k), None)):
        ours = kernels.combine(rows, back, factors)
        plain = routing.combine_reference(rows, back, factors)
        assert ours.dtype == plain.dtype == dtype
        ulp = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, plain, rtol=ulp, atol=1e-5)


def test_on_a_gpu_the_kernels_are_chosen_and_groups_take_the_reference(monkeypatch):
    monkeypatch.setattr(package, "serve", lambda tensor: True)
    called = []
    for name in ("route", "sort_slots", "spread", "combine"):
        kernel = getattr(kernels, name)
        spy = lambda *args, kernel=kernel, name=name: called.append(name) or kernel(*args)  # noqa: E731
        monkeypatch.setattr(kernels, name, spy)
    logits, bias = draw(5, 8), torch.zeros(8, device=DEVICE)
    grouped, _ = routing.route(logits, bias, 2, 2, 1, True, 1.0)
    assert not called and grouped.shape == (5, 2)
    weights, experts = routing.route(logits, bias, 2, 1, 1, True, 1.0)
    slots = routing.sort_slots(experts, 8)
    out = routing.combine(routing.spread(logits, slots.back, 2), slots.back, weights)
    assert called == ["route", "sort_slots", "spread", "combine"]
    torch.testing.assert_close(out, logits, msg="the weights of a token sum to 1")
