"""The kernel of 4-bit weights, interpreted without a GPU, against bitsandbytes on a CPU, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.model import quant
from nemo_ray.model.quant import QuantizedWeight
from tests.model.shapes import CPU

nf4 = pytest.importorskip("nemo_ray.model.kernels.nf4")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MARGIN = 32  # values around those asked for


@pytest.fixture(autouse=True, scope="module")
def bfloat16_rounds_as_on_a_gpu():
    """Triton's interpreter (3.7) cuts float32 off where a GPU rounds it."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, target)
        rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), target.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        yield


def quantized(shape: tuple[int, ...]) -> QuantizedWeight:
    """Of a normal tensor."""
    weight = QuantizedWeight(shape, CPU)
    values = torch.randn(weight.num_groups, weight.group_size, generator=torch.Generator().manual_seed(0))
    for parameter, rows in zip(weight.parameters(), weight.quantize(values * 0.02), strict=True):
        parameter.data.copy_(rows)
    return weight


def any_bytes(shape: tuple[int, ...], seed: int) -> QuantizedWeight:
    """Every half byte and every code of a scale, which a normal tensor has not."""
    weight, generator = QuantizedWeight(shape, CPU), torch.Generator().manual_seed(seed)
    for parameter in (weight.packed, weight.codes):
        parameter.data.view(torch.uint8).random_(0, 256, generator=generator)
    weight.nested.data.view(torch.float32).uniform_(0.5, 2, generator=generator)
    return weight


def by_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Into the middle of a buffer, whose rest must stay."""
    size = weight.shape.numel()
    buffer = torch.full((size + 2 * MARGIN,), 7.0, dtype=dtype, device=DEVICE)
    out = buffer[MARGIN:-MARGIN].view(weight.num_groups, -1)
    stored = (rows.to(DEVICE) for rows in weight._stored())
    found = nf4.dequantize(*stored, quant._weight_values(DEVICE), quant._scale_values(DEVICE), out)
    assert found is out
    assert (buffer[:MARGIN] == 7).all() and (buffer[-MARGIN:] == 7).all()
    return found.view(weight.shape).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (64, 48),  # less than a block a group
        (160, 64),
        (97, 211),  # one group of an odd size, over 256 blocks
        (3, 33, 7),
        (8, 96, 64),
        (2, 64, 256),  # 256 blocks a group
        (3, 70, 301),  # 330 blocks, the last of 14 values
    ],
)
def test_a_normal_tensor(shape, dtype):
    weight = quantized(shape)
    expected = weight.dequantize(dtype)
    assert expected.dtype == dtype and (expected != 0).any()
    assert torch.equal(by_kernel(weight, dtype), expected)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 4),
    size=st.one_of(st.integers(1, 300), st.integers(16_000, 17_000), st.integers(4000, 40_000)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_bytes_of_any_size(groups, size, dtype, seed):
    weight = any_bytes((groups, 1, size), seed)
    assert torch.equal(by_kernel(weight, dtype), weight.dequantize(dtype))
