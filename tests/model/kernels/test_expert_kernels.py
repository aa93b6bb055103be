"""The experts' kernels, interpreted, against their torch references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.model.activation import relu_squared_gradient_reference, relu_squared_reference
from nemo_ray.model.experts import activation_gradient_reference_, add_factors_reference_

grouped_lora = pytest.importorskip("nemo_ray.model.kernels.grouped_lora")
relu_squared = pytest.importorskip("nemo_ray.model.kernels.relu_squared")

# The interpreter has no products of bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
counts_of_experts = st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=9)


def drawn(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    scale = 1 + (float(expected.float().abs().max()) if expected.numel() else 0)
    return bool(((found.float() - expected.float()).abs() <= TOLERANCE[dtype] * scale).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=12, deadline=None)
@given(counts=counts_of_experts, columns=st.sampled_from([8, 136, 600]), rank=st.sampled_from([8, 16, 24]))
def test_factors_are_added(counts, columns, rank, dtype):
    draw = drawn(0, dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    rows = int(ends[-1])
    out, inner = draw(rows, columns), draw(rows, rank)
    for factors in (draw(len(counts), columns, rank), draw(len(counts), rank, columns).transpose(1, 2)):
        found = grouped_lora.add_factors_(out.clone(), inner, factors, ends)
        assert near(found, add_factors_reference_(out.clone(), inner, factors, ends), dtype)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=12, deadline=None)
@given(counts=counts_of_experts, columns=st.sampled_from([8, 136]), rank=st.sampled_from([0, 8]))
def test_the_gradient_of_the_activation_rides_along(counts, columns, rank, dtype, keep):
    draw = drawn(1, dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    rows = int(ends[-1])
    grad, hidden, weights = draw(rows, columns), draw(rows, columns), draw(rows).float()
    inner, factors = (draw(rows, rank), draw(len(counts), columns, rank)) if rank else (None, None)
    grads = grad.clone(), grad.clone()
    arguments = (hidden, weights, inner, factors, ends, keep)
    activated, dots = grouped_lora.activation_gradient_(grads[0], *arguments)
    expected, expected_dots = activation_gradient_reference_(grads[1], *arguments)
    pairs = [(dots, expected_dots), (grads[0], grads[1])]
    if keep:
        pairs.append((activated, expected))
    else:
        assert activated is expected is None
    for one, other in pairs:
        assert one.shape == other.shape and near(one, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 2048), (5, 1027)])
def test_relu_squared_and_its_gradient(shape, dtype):
    draw = drawn(2, dtype)
    x, grad = draw(*shape), draw(*shape)
    assert near(relu_squared.relu_squared(x), relu_squared_reference(x), dtype)
    found = relu_squared.relu_squared_gradient(grad, x)
    assert near(found, relu_squared_gradient_reference(grad, x), dtype)
