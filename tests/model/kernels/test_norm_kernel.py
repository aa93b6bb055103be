"""The kernels of RMSNorm, interpreted, against torch's."""

import pytest
import torch
from torch import nn

from nemo_ray.model import kernels
from nemo_ray.model.norm import residual_norm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


class Norm(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = 1 + torch.randn(size, generator=generator, dtype=torch.float32)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.variance_epsilon = 1e-3


def both_ways(hidden: torch.Tensor, norm: Norm, grads: tuple[torch.Tensor | None, torch.Tensor]):
    hidden = hidden.clone().requires_grad_()
    outputs = residual_norm(hidden, norm)
    used = [pair for pair in zip(outputs, grads, strict=True) if pair[1] is not None]
    torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])
    return *(out.detach() for out in outputs), hidden.grad


@pytest.mark.parametrize("residual", [True, False], ids=["residual used", "norm alone"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 16, 100])
def test_values_and_gradients(size, dtype, weight_dtype, residual, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, *grads = (torch.randn(2, 7, size, generator=generator).to(dtype) for _ in range(3))
    hidden[0, 3] = 0  # a row without scale
    hidden[1, 2] *= 100
    grads = (grads[0] if residual else None, grads[1])
    norm = Norm(size, torch.promote_types(dtype, weight_dtype))
    results = []
    for serve in (True, False):
        monkeypatch.setattr(kernels, "serve", lambda tensor, serve=serve: serve)
        results.append(both_ways(hidden, norm, grads))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        scale = 1 + expected.abs().amax(-1, keepdim=True)
        assert ((found - expected).abs() <= TOLERANCE[dtype] * scale).all()


def test_the_stream_itself_is_kept_and_no_copy_of_it(monkeypatch):
    monkeypatch.setattr(kernels, "serve", lambda tensor: True)
    hidden = torch.randn(4, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        residual, _ = residual_norm(hidden, Norm(16, torch.float32))
    assert residual.data_ptr() == hidden.data_ptr()
    assert sorted(tensor.numel() for tensor in saved if tensor.data_ptr() != hidden.data_ptr()) == [4, 16]


def test_a_norm_that_trains_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "serve", lambda tensor: True)
    norm = Norm(16, torch.float32)
    norm.weight.requires_grad_()
    residual_norm(torch.randn(4, 16), norm)[1].sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().sum() > 0
