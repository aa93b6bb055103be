"""4-bit weights: bitsandbytes' values in rows that any sharding makes alike, products and their gradients."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import PatchError
from nemo_ray.model import quant
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.linear import BaseLinear, linear
from nemo_ray.model.load import Precision, build, count_parameters, fill
from nemo_ray.model.lora import lora_parameters
from nemo_ray.model.quant import QuantizedWeight, bitsandbytes
from nemo_ray.model.selftest import self_test
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config, tiny_model

FOUR_BIT = Precision(linears_4bit=True, experts_4bit=True)
SHAPES = [(64, 48), (160, 64), (8, 96, 64), (3, 33, 7)]


def quantized(values: torch.Tensor) -> QuantizedWeight:
    weight = QuantizedWeight(tuple(values.shape), CPU)
    rows = weight.quantize(values.view(weight.num_groups, -1))
    for name, made in zip(("packed", "codes", "nested"), rows, strict=True):
        getattr(weight, name).data.copy_(made)
    return weight


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_values_come_back_as_nf4_gives_them(shape, storage, monkeypatch):
    monkeypatch.setattr(quant, "STORAGE", storage)
    values = draw(*shape) * 0.02
    weight = quantized(values)
    back = weight.dequantize(torch.float32)
    assert all(p.dtype == storage and not p.requires_grad for p in weight.parameters())
    assert back.shape == values.shape and 0.08 < (back - values).norm() / values.norm() < 0.1


def test_each_group_is_what_bitsandbytes_makes_of_it():
    values = draw(4, 96, 64)
    weight, bnb = quantized(values), bitsandbytes().functional
    rows, codes = weight.packed.view(torch.uint8), weight.codes.view(torch.uint8)
    back = weight.dequantize(torch.bfloat16)
    for expert in range(4):
        packed, state = bnb.quantize_4bit(
            values[expert].flatten(), compress_statistics=True, quant_type="nf4", blocksize=64
        )
        state.dtype = torch.bfloat16
        assert torch.equal(packed.flatten(), rows[expert])
        assert torch.equal(state.absmax, codes[expert, : state.absmax.numel()])
        assert torch.equal(bnb.dequantize_4bit(packed, state).view(96, 64), back[expert])


def test_a_weight_takes_little_more_than_four_bits():
    shape = (128, 1856, 2688)
    weight = QuantizedWeight(shape, torch.device("meta"))
    bits = 8 * sum(p.numel() * p.element_size() for p in weight.parameters()) / weight.shape.numel()
    assert 4.12 < bits < 4.13


def test_products_and_gradients_equal_those_of_the_dense_values():
    flat, up, down = quantized(draw(160, 64)), quantized(draw(8, 96, 64)), quantized(draw(8, 64, 96, seed=3))
    x, bias = draw(20, 64, seed=1), draw(160, seed=2)
    choice = draw(20, 8, seed=4).topk(2)
    results = []
    for one, *banks in (
        (flat, up, down),
        [torch.nn.Parameter(weight.dequantize(x.dtype)) for weight in (flat, up, down)],
    ):
        inputs, weights = x.clone().requires_grad_(), choice.values.clone().requires_grad_()
        tokens = RoutedExperts(*banks)(inputs, choice.indices, weights)
        out = linear(inputs, one, bias).sin().sum() + tokens.cos().sum()
        out.backward()
        results.append((out.detach(), inputs.grad, weights.grad))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-4)


def test_a_product_keeps_no_dense_weight_for_its_gradient():
    """What autograd saves of 4-bit experts is less than a tenth of their dense weights."""
    experts = RoutedExperts(quantized(draw(8, 96, 64)), quantized(draw(8, 64, 96)))
    x, choice = draw(5, 64).requires_grad_(), draw(5, 8, seed=1).topk(2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        experts(x, choice.indices, choice.values)
    assert 0 < sum(saved) < 2 * experts.up_proj.shape.numel() * 4 / 10


@pytest.mark.parametrize("latent", [None, 32])
def test_a_4bit_model_holds_its_linears_and_banks_in_4_bits_and_trains(latent):
    config = tiny_config(latent=latent)
    model, targets = build(config, AdapterSection(**ALL_TARGETS), FOUR_BIT, CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    dense = tiny_model(config, ALL_TARGETS)
    for name, module in model.named_modules():
        if isinstance(module, BaseLinear):
            assert isinstance(module.weight, QuantizedWeight), name
            near = dense.get_submodule(name).weight
            assert (module.weight.dequantize(torch.float32) - near).norm() < 0.1 * near.norm(), name
        if isinstance(module, RoutedExperts):
            assert isinstance(module.up_proj, QuantizedWeight) and isinstance(
                module.down_proj, QuantizedWeight
            )
        assert not isinstance(module, torch.nn.Linear) or name == "lm_head"
    assert count_parameters(model) == count_parameters(dense)
    self_test(model, targets, CPU, torch.float32)
    assert all(p.requires_grad for p in lora_parameters(model).values())


def test_the_loss_is_near_the_dense_models():
    dense = tiny_model(tiny_config(initializer_range=0.05))
    model, _ = build(tiny_config(initializer_range=0.05), AdapterSection(), FOUR_BIT, CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    ids = torch.randint(0, 128, (1, 96), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths(ids, [[60, 36]])
    ours, theirs = (
        m.packed_logits(batch).detach().log_softmax(-1).gather(-1, batch.input_ids[..., None]).mean()
        for m in (model, dense)
    )
    assert abs(float(ours - theirs)) < 0.02 * abs(float(theirs))


def test_a_library_that_gives_back_something_else_is_refused(monkeypatch):
    bnb = bitsandbytes().functional
    sound = bnb.dequantize_4bit
    monkeypatch.setattr(bnb, "dequantize_4bit", lambda *args, **keys: sound(*args, **keys).roll(1))
    with pytest.raises(PatchError, match=r"bitsandbytes .* on cpu: a weight comes back from 4 bits with"):
        quantized(draw(64, 64))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_casting_the_model_leaves_the_bytes(storage, monkeypatch):
    monkeypatch.setattr(quant, "STORAGE", storage)
    model, _ = build(tiny_config(), AdapterSection(), FOUR_BIT, CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    before = [[rows.clone() for rows in weight._stored()] for weight in weights]
    model.to(torch.bfloat16).float()
    assert model.dtype == torch.float32 and len(weights) > 10
    for weight, rows in zip(weights, before, strict=True):
        assert all(map(torch.equal, weight._stored(), rows))
