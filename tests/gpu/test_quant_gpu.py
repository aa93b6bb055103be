"""4-bit weights on a GPU: bitsandbytes' values, a model that trains, a base built without spare memory."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.quant import QuantizedWeight
from nemo_ray.model.selftest import self_test
from tests.model.shapes import ALL_TARGETS, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")


def quantized(shape: tuple[int, ...], device: torch.device) -> QuantizedWeight:
    """Of the same normal tensor on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = QuantizedWeight(shape, device)
    made = weight.quantize(values.to(device).view(weight.num_groups, -1))
    for name, rows in zip(("packed", "codes", "nested"), made, strict=True):
        getattr(weight, name).data.copy_(rows)
    return weight


@pytest.mark.parametrize("shape", [(160, 64), (8, 96, 64), (3, 33, 7)])
def test_the_values_are_those_of_the_cpu(shape):
    backs = [quantized(shape, d).dequantize(torch.float32).cpu() for d in (torch.device("cpu"), GPU)]
    assert ((backs[0] - backs[1]).abs() > 1e-5).float().mean() < 1e-3  # a tie may fall either way
    assert (backs[0] - backs[1]).norm() < 0.01 * backs[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(64, 48), (10304, 2688), (97, 211), (8, 96, 64), (3, 33, 7), (3, 70, 301), (4, 1856, 2688)]
)
def test_the_kernel_gives_bitsandbytes_values_bit_for_bit(shape, dtype):
    weight = quantized(shape, GPU)
    expected = weight._values_reference(*weight._stored(), dtype).reshape(shape)
    assert torch.equal(weight.dequantize(dtype), expected)
    assert torch.equal(weight.borrow(dtype), expected)


def test_borrowing_takes_the_workspace_and_nothing_else():
    """Also of a size that fills no last block; recorded into a graph, it makes the values at each replay."""
    weight = quantized((3, 700, 301), GPU)
    expected = weight.dequantize(torch.bfloat16)
    whole = weight.borrow(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = weight.borrow(torch.bfloat16)
    assert torch.cuda.max_memory_allocated() == before and again.data_ptr() == whole.data_ptr()

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.borrow(torch.bfloat16)
    whole.zero_()
    graph.replay()
    assert torch.equal(whole, expected)


def test_a_4bit_model_passes_the_self_test():
    precision = Precision(torch.bfloat16, torch.bfloat16, linears_4bit=True, experts_4bit=True)
    config = tiny_config(mamba_head_dim=32, ssm_state_size=32, chunk_size=64, hidden_size=128)
    model, targets = build(config, AdapterSection(**ALL_TARGETS), precision, GPU)
    fill(model, None, seed=3, device=GPU, adapter_seed=3)
    self_test(model, targets, GPU, torch.bfloat16)


def test_quantizing_while_loading_takes_the_final_size_and_some_more():
    """A bank of 0.5 GiB in bf16 is never there as a whole."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    precision = Precision(torch.bfloat16, torch.bfloat16, linears_4bit=True, experts_4bit=True)
    shape = {"hidden_size": 1024, "moe_intermediate_size": 2048, "n_routed_experts": 128, "n_group": 1}
    model, _ = build(tiny_config(pattern="EE", **shape), AdapterSection(), precision, GPU)
    fill(model, None, seed=3, device=GPU, adapter_seed=3)
    final = torch.cuda.memory_allocated() - before
    assert final > 0.5 * 2**30
    assert torch.cuda.max_memory_allocated() - before < final + 0.75 * 2**30
