"""The torch scan, convolution and norm against plain loops over the tokens of each document, in float64.

The loops know documents by their lengths and tokens one at a time; of chunks, masks and `seq_idx` they know
nothing. Compared are values, final states and the gradients of every input.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_ray.model.ssd import causal_conv1d, gated_group_norm, split_conv1d_scan, ssd_scan

H, P, G, N = 4, 3, 2, 5
FREE = (0.0, float("inf"))
Rows = list[list[int]]  # the documents' lengths, row by row
Tensors = dict[str, torch.Tensor]


def spans(lengths: list[int]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def numbered(rows: Rows, step: int = 1) -> torch.Tensor:
    """seq_idx (B, T); documents are numbered in steps, as only equality may count."""
    return torch.stack(
        [torch.arange(len(row)).mul(step).repeat_interleave(torch.tensor(row)) for row in rows]
    ).int()


def documents_alone(rows: Rows, x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
                    dt_limit=FREE):  # fmt: skip
    """h = exp(dt A) h + dt B x and y = C h + D x, token after token; each document from a state of its own.

    Returns: y (B, T, H, P) and the state of each row's last document (B, H, P, N).
    """
    heads = x.shape[2]
    group_of_head = torch.arange(heads) // (heads // B.shape[2])
    outputs, states = [], []
    for row, lengths in enumerate(rows):
        for number, document in enumerate(spans(lengths)):
            h = torch.zeros(heads, x.shape[3], B.shape[3], dtype=x.dtype)
            if number == 0 and initial_states is not None:
                h = initial_states[row]
            for t in range(document.start, document.stop):
                step = dt[row, t] if dt_bias is None else dt[row, t] + dt_bias
                step = (1 + step.exp()).log() if dt_softplus else step
                step = torch.minimum(
                    torch.maximum(step, x.new_tensor(dt_limit[0])), x.new_tensor(dt_limit[1])
                )
                fed = torch.einsum("h,hp,hn->hpn", step, x[row, t], B[row, t, group_of_head])
                h = (step * A).exp()[:, None, None] * h + fed
                y = torch.einsum("hpn,hn->hp", h, C[row, t, group_of_head])
                outputs.append(y if D is None else y + D[:, None] * x[row, t])
        states.append(h)
    return torch.stack(outputs).view(x.shape), torch.stack(states)


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()
    }


def scan_inputs(batch: int, tokens: int, heads: int = H, groups: int = G, seed: int = 0) -> Tensors:
    shapes = {
        "x": (batch, tokens, heads, P),
        "dt": (batch, tokens, heads),
        "A": (heads,),
        "B": (batch, tokens, groups, N),
        "C": (batch, tokens, groups, N),
        "D": (heads,),
        "dt_bias": (heads,),
        "initial_states": (batch, heads, P, N),
    }
    inputs = draw(shapes, seed)
    return inputs | {"A": -inputs["A"].exp()}


def with_gradients(function, inputs: Tensors) -> list[torch.Tensor]:
    """The outputs of `function(**inputs)`, then the gradient of each input under one fixed loss."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    weights = draw({str(i): tuple(out.shape) for i, out in enumerate(outputs)}, seed=1).values()
    loss = sum((out * weight).sum() + out.sin().sum() for out, weight in zip(outputs, weights, strict=True))
    loss.backward()
    return [*outputs, *(leaf.grad for leaf in leaves.values())]


def assert_equal(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for i, (our, expected) in enumerate(zip(ours, plain, strict=True)):
        scale = 1 + float(expected.detach().abs().max())
        torch.testing.assert_close(
            our, expected, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, i=i: f"{i}: {m}"
        )


def assert_scan_is_exact(
    rows: Rows, inputs: Tensors, chunk_size: int, number_step: int = 1, **options
) -> None:
    seq_idx = numbered(rows, number_step) if max(len(row) for row in rows) > 1 else None

    def chunked(**leaves):
        return ssd_scan(**leaves, chunk_size=chunk_size, seq_idx=seq_idx, return_final_states=True, **options)

    def plain(**leaves):
        return documents_alone(rows, **leaves, **options)

    assert_equal(with_gradients(chunked, inputs), with_gradients(plain, inputs))


LAYOUTS = {
    "one document": [[37], [37]],
    "edges inside and on chunks": [[5, 3, 12, 17], [16, 21]],
    "one-token documents in a chunk": [[1] * 30 + [7], [1, 1, 1, 1, 25, 8]],
    "one-token documents alone": [[1] * 37, [1] * 36 + [1]],
    "over several chunks": [[2, 35], [31, 6]],
    "a document of exactly a chunk": [[8, 8, 8, 13], [4, 4, 29]],
}


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_scan_equals_the_recurrence(rows, chunk_size):
    assert_scan_is_exact(rows, scan_inputs(2, 37), chunk_size, dt_softplus=True, dt_limit=(0.1, 1.5))


@st.composite
def layouts(draw_from: st.DrawFn) -> Rows:
    tokens = draw_from(st.integers(1, 26))
    rows = []
    for _ in range(draw_from(st.integers(1, 2))):
        edges = [0, *sorted(draw_from(st.sets(st.integers(1, tokens))) - {tokens}), tokens]
        rows.append([b - a for a, b in zip(edges, edges[1:], strict=False)])
    return rows


@settings(max_examples=80, deadline=None)
@given(
    rows=layouts(),
    groups=st.integers(1, 3),
    heads_a_group=st.integers(1, 3),
    chunk_size=st.integers(1, 30),
    left_out=st.sets(st.sampled_from(["D", "dt_bias", "initial_states"])),
    number_step=st.integers(1, 3),
    dt_softplus=st.booleans(),
    dt_limit=st.sampled_from([FREE, (0.2, float("inf")), (0.0, 0.9), (0.3, 1.1)]),
    seed=st.integers(0, 99),
)
def test_scan_equals_the_recurrence_whatever_is_asked(
    rows, groups, heads_a_group, chunk_size, left_out, number_step, dt_softplus, dt_limit, seed
):
    """Any shape and layout, T seldom a multiple of the chunk, any choice of the optional inputs."""
    inputs = scan_inputs(len(rows), sum(rows[0]), groups * heads_a_group, groups, seed)
    inputs = {name: value for name, value in inputs.items() if name not in left_out}
    options = {"number_step": number_step, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    assert_scan_is_exact(rows, inputs, chunk_size, **options)


@pytest.mark.parametrize("cut", [1, 8, 13, 21, 39])
def test_a_row_in_two_calls_goes_on_from_its_state_and_its_gradients_come_back(cut):
    rows = [[10, 30], [3, 27, 10]]
    seq_idx = numbered(rows)
    options = {"chunk_size": 8, "dt_softplus": True, "return_final_states": True}

    def whole(**leaves):
        return ssd_scan(**leaves, seq_idx=seq_idx, **options)

    def in_two(x, dt, B, C, initial_states, **weights):
        first, second = (
            {"x": x[:, part], "dt": dt[:, part], "B": B[:, part], "C": C[:, part]}
            | {"seq_idx": seq_idx[:, part]}
            for part in (slice(cut), slice(cut, None))
        )
        y, state = ssd_scan(**first, **weights, **options, initial_states=initial_states)
        goes_on = (seq_idx[:, cut] == seq_idx[:, cut - 1]).view(-1, 1, 1, 1)
        rest, state = ssd_scan(**second, **weights, **options, initial_states=state * goes_on)
        return torch.cat([y, rest], dim=1), state

    inputs = scan_inputs(2, 40)
    assert_equal(with_gradients(in_two, inputs), with_gradients(whole, inputs))


def test_a_document_does_not_move_the_others():
    """Not within rounding but to the last bit: what is masked is zero, not small."""
    rows = [[5, 1, 3, 12, 16]]
    seq_idx = numbered(rows)
    inputs = scan_inputs(1, 37)
    plain = ssd_scan(**inputs, chunk_size=8, seq_idx=seq_idx, dt_softplus=True)
    moved = {name: value.clone() for name, value in inputs.items()}
    third = spans(rows[0])[2]
    for name in ("x", "B", "C"):
        moved[name][:, third] += 100.0
    after = ssd_scan(**moved, chunk_size=8, seq_idx=seq_idx, dt_softplus=True)
    outside = torch.ones(37, dtype=torch.bool)
    outside[third] = False
    assert torch.equal(after[:, outside], plain[:, outside])
    assert (after - plain)[:, third].abs().min() > 0


def test_strong_decay_gives_finite_gradients():
    """exp of what lies above the diagonal would overflow; it must be masked before, not after."""
    inputs = {name: value.float() for name, value in scan_inputs(1, 40).items()}
    inputs["dt"] = inputs["dt"].abs() * 1e3
    seq_idx = numbered([[1, 20, 19]])
    outputs = with_gradients(lambda **leaves: [ssd_scan(**leaves, chunk_size=16, seq_idx=seq_idx)], inputs)
    assert all(value.isfinite().all() for value in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = {name: value.to(dtype) for name, value in scan_inputs(2, 37).items()}
    options = {"chunk_size": 8, "seq_idx": numbered(LAYOUTS["over several chunks"]), "dt_softplus": True}
    half, state = ssd_scan(**inputs, **options, return_final_states=True)
    full = {name: value.float() for name, value in inputs.items()}
    y, expected_state = ssd_scan(**full, **options, return_final_states=True)
    assert half.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(half, y.to(dtype)) and torch.equal(state, expected_state)


def test_float32_is_close_to_float64():
    inputs = scan_inputs(2, 600)
    inputs["dt"] = inputs["dt"] - 2
    options = {"chunk_size": 128, "seq_idx": numbered([[300, 1, 299], [600]]), "dt_softplus": True}
    exact = ssd_scan(**inputs, **options)
    single = ssd_scan(**{name: value.float() for name, value in inputs.items()}, **options)
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


class BytesMade(TorchDispatchMode):
    """Adds up the storage of every result of every operation, of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.total += tensor.untyped_storage().nbytes()
        return out


def bytes_of_a_step(tokens: int) -> tuple[int, int]:
    """Of documents of 10 tokens: what the forward pass keeps for the backward, and all that both make."""
    inputs = {name: value.requires_grad_() for name, value in scan_inputs(1, tokens).items()}
    seq_idx = numbered([[10] * (tokens // 10)])
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with BytesMade() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, state = ssd_scan(
            **inputs, chunk_size=16, seq_idx=seq_idx, dt_softplus=True, dt_limit=(0.1, 1.0),
            return_final_states=True,
        )  # fmt: skip
        (y.sum() + state.sum()).backward()
    return sum(kept.values()), made.total


def test_memory_and_work_are_linear_in_the_tokens():
    kept, made = bytes_of_a_step(640)
    kept_of_4, made_of_4 = bytes_of_a_step(2560)
    assert kept_of_4 < 4.1 * kept
    assert made_of_4 < 4.1 * made


def convolution_alone(rows: Rows, x, weight, bias=None) -> torch.Tensor:
    """y[t] = bias + sum over k of weight[K-1-k] x[t-k], t-k within the document."""
    width = weight.shape[1]
    outputs = []
    for row, lengths in enumerate(rows):
        for document in spans(lengths):
            for t in range(document.start, document.stop):
                y = torch.zeros_like(x[row, t]) if bias is None else bias
                for k in range(min(width, t - document.start + 1)):
                    y = y + weight[:, width - 1 - k] * x[row, t - k]
                outputs.append(y)
    return torch.stack(outputs).view(x.shape)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("rows", [[[1, 1, 7, 14], [20, 3]], [[23], [23]], [[2, 1], [1, 2]]], ids=str)
def test_convolution_equals_that_of_each_document_alone(rows, width, biased, activation):
    seq_idx = numbered(rows, step=2) if max(len(row) for row in rows) > 1 else None
    inputs = draw({"x": (2, sum(rows[0]), 6), "weight": (6, width)} | ({"bias": (6,)} if biased else {}))

    def plain(**leaves):
        y = convolution_alone(rows, **leaves)
        return [y if activation is None else y * torch.sigmoid(y)]

    ours = with_gradients(lambda **c: [causal_conv1d(**c, seq_idx=seq_idx, activation=activation)], inputs)
    assert_equal(ours, with_gradients(plain, inputs))


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_normalizes_each_group_after_the_gate(groups):
    inputs = draw({"y": (2, 5, 12), "gate": (2, 5, 12), "weight": (12,)})

    def plain(y, gate, weight):
        parts = (y * gate * torch.sigmoid(gate)).split(12 // groups, dim=-1)
        return [weight * torch.cat([p / ((p**2).mean(-1, keepdim=True) + 0.1).sqrt() for p in parts], dim=-1)]

    ours = with_gradients(lambda **leaves: [gated_group_norm(**leaves, eps=0.1, groups=groups)], inputs)
    assert_equal(ours, with_gradients(plain, inputs))


@pytest.mark.parametrize("rows", [[[1, 9, 1, 12], [23]], [[4, 19], [8, 8, 7]]], ids=str)
def test_the_whole_mixer_equals_its_parts_run_on_each_document(rows):
    """`split_conv1d_scan` cuts in_proj's output into gate, x, B, C and dt, and passes every option on."""
    inner, channels, tokens = H * P, H * P + 2 * G * N, sum(rows[0])
    inputs = draw(
        {"zxbcdt": (2, tokens, inner + channels + H), "conv1d_weight": (channels, 4)}
        | {"conv1d_bias": (channels,), "dt_bias": (H,), "A": (H,), "D": (H,), "rmsnorm_weight": (inner,)}
        | {"initial_states": (2, H, P, N)}
    )
    inputs["A"] = -inputs["A"].exp()
    limit = (0.3, 1.2)

    def fused(**leaves):
        return [
            split_conv1d_scan(
                **leaves, chunk_size=8, seq_idx=numbered(rows), dt_limit=limit, rmsnorm_eps=0.1,
                headdim=P, ngroups=G,
            )
        ]  # fmt: skip

    def plain(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, initial_states):
        gate, xBC, dt = zxbcdt[..., :inner], zxbcdt[..., inner : inner + channels], zxbcdt[..., -H:]
        xBC = F.silu(convolution_alone(rows, xBC, conv1d_weight, conv1d_bias))
        x, B, C = xBC[..., :inner], xBC[..., inner : inner + G * N], xBC[..., inner + G * N :]
        y, _ = documents_alone(
            rows, x.unflatten(-1, (H, P)), dt, A, B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), D,
            dt_bias, initial_states, True, limit,
        )  # fmt: skip
        parts = (y.flatten(2) * F.silu(gate)).unflatten(-1, (G, -1))
        normal = parts / (parts.square().mean(-1, keepdim=True) + 0.1).sqrt()
        return [rmsnorm_weight * normal.flatten(-2)]

    assert_equal(with_gradients(fused, inputs), with_gradients(plain, inputs))
