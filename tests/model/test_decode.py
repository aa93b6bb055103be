"""The cached forward against the packed one: same logits, however the text is split; and drawing tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.decode import (
    AttentionCache,
    Cache,
    MambaCache,
    Sampling,
    choose_token,
    generate_tokens,
    next_logits,
    read_prompt,
    state_step,
)
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.sharding import local_rows
from nemo_ray.model.ssd import ssd_scan
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.parallelize import Layout, parallelize
from tests.group import run_in_group
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config, tiny_model
from tests.model.uncached import complete_greedily

NUM_TOKENS = 75  # chunks are of 16
NO_END = frozenset({-1})


def random_ids(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


def shaken_model(**overrides: object):
    """LoRA acts everywhere, and Mamba's steps reach both ends of any limit."""
    model = tiny_model(tiny_config(**overrides), ALL_TARGETS).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3 - 3)
            if name.endswith("conv1d.bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model():
    return shaken_model()


def packed_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.packed_logits(PackedBatch.from_lengths(ids, [[ids.shape[1]]] * len(ids)))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.std())


def remembered(cache: Cache) -> list[torch.Tensor]:
    tensors = []
    for memory in cache.blocks:
        if isinstance(memory, AttentionCache):
            tensors += [memory.keys[:, :, : memory.num_tokens], memory.values[:, :, : memory.num_tokens]]
        elif isinstance(memory, MambaCache):
            tensors += [memory.conv_tail, memory.state]
    return tensors


@pytest.mark.parametrize(
    "overrides",
    [{}, {"latent": 32}, {"time_step_limit": (0.01, 0.1)}, {"conv_kernel": 2}, {"pattern": "*EM"}],
    ids=["plain", "latent", "dt_limit", "conv_kernel", "attention_first"],
)
def test_every_step_has_the_logits_of_the_packed_forward(overrides):
    model, ids = shaken_model(**overrides), random_ids(NUM_TOKENS)
    expected = packed_logits(model, ids)[0]
    for prompt in (1, 2, 40):
        cache = Cache(model)
        assert close(read_prompt(model, ids[:, :prompt], cache)[0], expected[prompt - 1])
        for position in range(prompt, NUM_TOKENS):
            logits = next_logits(model, ids[:, position : position + 1], cache)
            assert close(logits[0], expected[position]), (prompt, position)


def test_the_limit_of_steps_acts():
    ids = random_ids(NUM_TOKENS)
    free, limited = (
        read_prompt(model, ids, Cache(model))
        for model in (shaken_model(), shaken_model(time_step_limit=(0.01, 0.1)))
    )
    assert (free - limited).abs().max() > 0.05 * free.std()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_split_gives_the_same_logits_and_the_same_memory(model, sizes):
    ids = random_ids(sum(sizes))
    whole, split = Cache(model), Cache(model)
    expected = next_logits(model, ids, whole)
    for piece in ids.split(sizes, dim=1):
        found = next_logits(model, piece, split)
    assert close(found, expected)
    for one, other in zip(remembered(split), remembered(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_read_in_pieces(model):
    ids = random_ids(100)
    pieces = []
    hook = model.model.embeddings.register_forward_hook(lambda _, args, out: pieces.append(out.shape[1]))
    found = read_prompt(model, ids, Cache(model), piece_tokens=33)
    hook.remove()
    assert pieces == [33, 33, 33, 1]
    assert close(found[0], packed_logits(model, ids)[0, -1])


def test_a_long_text_outgrows_the_first_buffers(model):
    ids = random_ids(700)
    cache = Cache(model)
    expected = packed_logits(model, ids)[0]
    for start in range(0, 700, 100):
        found = next_logits(model, ids[:, start : start + 100], cache)
        assert close(found[0], expected[start + 99])


def test_several_texts_at_once(model):
    ids = torch.cat([random_ids(30, seed) for seed in (1, 2, 3)])
    cache = Cache(model)
    read_prompt(model, ids[:, :29], cache)
    assert close(next_logits(model, ids[:, 29:], cache), packed_logits(model, ids)[:, -1])


@pytest.mark.parametrize("latent", [None, 32], ids=["plain", "latent"])
def test_greedy_tokens_equal_those_without_a_cache(latent):
    model = shaken_model(latent=latent)
    bare = tiny_model(tiny_config(latent=latent)).eval()
    prompt = random_ids(21)[0].tolist()
    expected = complete_greedily(model.packed_logits, prompt, 60, NO_END, CPU)
    assert len(set(expected)) > 5
    assert list(generate_tokens(model, prompt, 60, NO_END)) == expected
    assert list(generate_tokens(bare, prompt, 60, NO_END)) != expected  # the adapter acts


def test_any_of_the_end_tokens_ends_it(model):
    prompt = random_ids(21)[0].tolist()
    free = list(generate_tokens(model, prompt, 30, NO_END))
    last = free.index(free[12])
    assert list(generate_tokens(model, prompt, 30, frozenset({free[12], 127, -1}))) == free[:last]


def test_float64_keeps_its_precision():
    model, ids = shaken_model().double(), random_ids(NUM_TOKENS)
    model.compute_dtype = torch.float64
    cache = Cache(model)
    read_prompt(model, ids[:, :50], cache)
    for position in range(50, NUM_TOKENS):
        logits = next_logits(model, ids[:, position : position + 1], cache)
    states = [memory.state.dtype for memory in cache.blocks if isinstance(memory, MambaCache)]
    assert set(states) == {torch.float64}
    assert (logits[0] - packed_logits(model, ids)[0, -1]).abs().max() < 1e-5  # logits are float32


@pytest.mark.parametrize("first", [1, 39])
def test_a_bf16_model_carries_its_state_in_float32(first):
    model, _ = build(tiny_config(), AdapterSection(), Precision(torch.bfloat16, torch.bfloat16), CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    cache, ids = Cache(model), random_ids(40)
    for piece in ids.split([first] + [1] * (40 - first), dim=1):
        found = next_logits(model, piece, cache)
        states = [memory.state.dtype for memory in cache.blocks if isinstance(memory, MambaCache)]
        assert set(states) == {torch.float32}
    expected = packed_logits(model, ids)[:, -1]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_float32_masters_of_a_bf16_computation():
    model, _ = build(tiny_config(), AdapterSection(), Precision(torch.float32, torch.bfloat16), CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    cache, ids = Cache(model), random_ids(40)
    read_prompt(model, ids[:, :39], cache)
    expected = packed_logits(model, ids)[:, -1]
    assert (next_logits(model, ids[:, 39:], cache) - expected).norm() < 0.05 * expected.norm()


def test_a_state_step_is_a_scan_of_one_token():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt, B, C, state = draw(2, 8, 5), draw(2, 8), draw(2, 4, 6), draw(2, 4, 6), draw(2, 8, 5, 6)
    A, D, dt_bias, limit = -draw(8).exp(), draw(8), draw(8), (0.3, 0.9)
    y, after = state_step(x, dt, A, B, C, state, D, dt_bias, limit)
    expected = ssd_scan(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], 16, D=D, dt_bias=dt_bias, initial_states=state,
        dt_softplus=True, dt_limit=limit, return_final_states=True,
    )  # fmt: skip
    torch.testing.assert_close((y[:, None], after), expected)


def test_a_seed_gives_the_same_text_and_another_one_another(model):
    prompt = random_ids(9)[0].tolist()

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate_tokens(model, prompt, 30, NO_END, Sampling(temperature=1.0), generator))

    assert drawn(1) == drawn(1) != drawn(2)


def test_draws_follow_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 2.0):
        draws = [choose_token(logits, Sampling(temperature), generator) for _ in range(4000)]
        shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.03, rtol=0)
    assert choose_token(logits, Sampling(temperature=1e-6), generator) == 2


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {2}), (0.5, {2}), (0.51, {1, 2}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_that_have_the_share(top_p, kept):
    logits = torch.tensor([0.15, 0.3, 0.5, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    draws = {choose_token(logits, Sampling(1.0, top_p), generator) for _ in range(500)}
    assert draws == kept


def generate_sharded(rank: int, factors_whole: bool) -> None:
    model, _ = build(tiny_config(latent=32), AdapterSection(**ALL_TARGETS), Precision(), CPU)
    bind_loss(model)
    parallel = parallelize(model, Layout(1, 2), CPU, False, factors_whole)
    assert parallel.sharded != factors_whole
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    parallel.hold_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            local, first = local_rows(parameter.detach())
            local.normal_(0, 0.1, generator=torch.Generator().manual_seed(first))
    prompt = random_ids(21)[0].tolist()
    expected = complete_greedily(model.eval().packed_logits, prompt, 20, NO_END, CPU)
    before = {name: p for name, p in model.named_parameters()}
    assert list(generate_tokens(model, prompt, 20, NO_END)) == expected
    assert all(p is before[name] for name, p in model.named_parameters())  # sharded again, for the optimizer
    model.packed_logits(PackedBatch.from_lengths(random_ids(20), [[20]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.timeout(120)
@pytest.mark.long
@pytest.mark.parametrize("factors_whole", [True, False], ids=["frozen base", "everything"])
def test_a_sharded_model_generates_the_same_and_trains_on(tmp_path, factors_whole):
    run_in_group(generate_sharded, 2, tmp_path, factors_whole, limit_s=100)
