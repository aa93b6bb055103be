"""The chunked scan and the convolution against a plain recurrence, in float64: values and gradients."""

import pytest
import torch

from nemo_ray.model.ssd import causal_conv1d, ssd_scan

B, H, P, G, N = 2, 4, 3, 2, 5


def sequential_scan(x, dt, A, B, C, D, dt_bias, dt_limit, initial_states, seq_idx):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, one token at a time."""
    heads_per_group = x.shape[2] // B.shape[2]
    dt = torch.nn.functional.softplus(dt + dt_bias).clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    h = initial_states
    outputs = []
    for t in range(x.shape[1]):
        if t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = (dt[:, t] * A).exp()[:, :, None, None]
        h = h * decay + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), h


def inputs(num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "x": draw(B, num_tokens, H, P),
        "dt": draw(B, num_tokens, H),
        "A": -draw(H).exp(),
        "B": draw(B, num_tokens, G, N),
        "C": draw(B, num_tokens, G, N),
        "D": draw(H),
        "dt_bias": draw(H),
        "initial_states": draw(B, H, P, N),
    }


def documents(num_tokens: int, cuts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    seq_idx = torch.zeros(B, num_tokens, dtype=torch.int32)
    for row, row_cuts in enumerate(cuts):
        for cut in row_cuts:
            seq_idx[row, cut:] += 1
    return seq_idx


LAYOUTS = {
    "one document": ((), ()),
    "edges inside and on chunks": ((5, 8, 20), (16,)),
    "many short documents in a chunk": (tuple(range(1, 30)), (1, 2, 3, 4, 29)),
    "over several chunks": ((2,), (31,)),
}


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
@pytest.mark.parametrize("num_tokens", [32, 37])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_scan_equals_the_recurrence_with_gradients(layout, num_tokens, chunk_size):
    seq_idx = documents(num_tokens, layout)
    dt_limit = (0.1, 1.5)
    results = []
    for chunked in (True, False):
        args = {name: value.clone().requires_grad_() for name, value in inputs(num_tokens).items()}
        if chunked:
            y, state = ssd_scan(
                **args, chunk_size=chunk_size, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit,
                return_final_states=True,
            )  # fmt: skip
        else:
            y, state = sequential_scan(**args, dt_limit=dt_limit, seq_idx=seq_idx)
        weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ((y * weights).sum() + state.sin().sum()).backward()
        results.append([y, state, *(value.grad for value in args.values())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_a_document_in_two_calls_goes_on_from_its_state():
    args = inputs(40)
    seq_idx = documents(40, ((10,), (3, 30)))
    common = {"chunk_size": 8, "dt_softplus": True}
    shared = {name: args[name] for name in ("A", "D", "dt_bias")}

    def part(a: int, b: int) -> dict[str, torch.Tensor]:
        return {name: args[name][:, a:b] for name in ("x", "dt", "B", "C")} | {"seq_idx": seq_idx[:, a:b]}

    whole = ssd_scan(**part(0, 40), **shared, **common)
    first, state = ssd_scan(**part(0, 21), **shared, **common, return_final_states=True)
    second = ssd_scan(**part(21, 40), **shared, **common, initial_states=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-9, atol=1e-9)


def test_convolution_equals_that_of_each_document_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 23, 6, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    seq_idx = documents(23, ((1, 2, 9), (20,)))
    packed = causal_conv1d(x, weight, bias, seq_idx, "silu")
    for row in range(B):
        for document in seq_idx[row].unique():
            tokens = seq_idx[row] == document
            alone = torch.nn.functional.conv1d(
                torch.nn.functional.pad(x[row, tokens].T[None], (3, 0)), weight[:, None], bias, groups=6
            )
            torch.testing.assert_close(packed[row, tokens], torch.nn.functional.silu(alone[0].T))
