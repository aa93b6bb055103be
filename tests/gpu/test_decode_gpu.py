"""With mamba-ssm on a GPU: the cached forward equals the packed one, and its scan the torch reference."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.decode import Cache, MambaCache, Sampling, generate_tokens, next_logits, read_prompt
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.ssd import select_chunk_scan, ssd_scan
from tests.model.shapes import ALL_TARGETS, randomize_lora, tiny_config
from tests.model.uncached import complete_greedily

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
SHAPE = {"mamba_head_dim": 32, "ssm_state_size": 32, "chunk_size": 64, "hidden_size": 128}
NUM_TOKENS = 300
SPLITS = ([300], [100, 64, 136], [1, 1, 1, 297], [299, 1], [150] + [1] * 150)


def gpu_model(dtype: torch.dtype, **overrides: object):
    config = tiny_config(**(SHAPE | overrides))
    model, _ = build(config, AdapterSection(**ALL_TARGETS), Precision(dtype, dtype), GPU)
    fill(model, None, seed=3, device=GPU, adapter_seed=3)
    randomize_lora(model)
    return model.eval()


def random_ids() -> torch.Tensor:
    return torch.randint(0, 128, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1)).to(GPU)


def packed_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.packed_logits(PackedBatch.from_lengths(ids, [[ids.shape[1]]]))[0]


def cached_logits(model, ids: torch.Tensor, split: list[int]) -> tuple[torch.Tensor, Cache]:
    """The logits after each piece."""
    cache = Cache(model)
    return torch.cat([next_logits(model, piece, cache) for piece in ids.split(split, dim=1)]), cache


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(
    "overrides", [{}, {"latent": 64}, {"time_step_limit": (0.01, 0.1)}], ids=["plain", "latent", "dt_limit"]
)
def test_any_split_has_the_logits_of_the_packed_forward_in_float32(overrides):
    model, ids = gpu_model(torch.float32, **overrides), random_ids()
    expected = packed_logits(model, ids)
    for split in SPLITS:
        found, cache = cached_logits(model, ids, split)
        ends = torch.tensor(split).cumsum(0) - 1
        error = (found - expected[ends.to(GPU)]).abs()
        assert error.max() < 1e-5 * expected.std(), split
        states = [memory.state for memory in cache.blocks if isinstance(memory, MambaCache)]
        assert {state.dtype for state in states} == {torch.float32}


@pytest.mark.usefixtures("exact_float32")
def test_bf16_is_as_near_to_float32_as_the_packed_forward():
    exact, model, ids = gpu_model(torch.float32), gpu_model(torch.bfloat16), random_ids()
    own = dict(model.state_dict())
    model.load_state_dict({name: v.to(own[name].dtype) for name, v in exact.state_dict().items()})
    exact.load_state_dict({name: v.float() for name, v in model.state_dict().items()})
    truth = packed_logits(exact, ids)
    packed_error = (packed_logits(model, ids) - truth)[150:].norm(dim=-1)
    found, _ = cached_logits(model, ids, [150] + [1] * 150)
    # The median: a last bit that flips a choice of experts moves a token far, on either path.
    assert (found[1:] - truth[150:]).norm(dim=-1).median() < 1.3 * packed_error.median()


@pytest.mark.usefixtures("exact_float32")
def test_greedy_tokens_equal_those_without_a_cache():
    model = gpu_model(torch.float32)
    prompt = random_ids()[0, :90].tolist()
    expected = complete_greedily(model.packed_logits, prompt, 40, frozenset({-1}), GPU)
    assert list(generate_tokens(model, prompt, 40, frozenset({-1}))) == expected


def test_a_seed_repeats_the_draws():
    model, prompt = gpu_model(torch.bfloat16), random_ids()[0, :20].tolist()
    sampling = Sampling(temperature=1.0, top_p=0.9)

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator(GPU).manual_seed(seed)
        return list(generate_tokens(model, prompt, 30, frozenset({-1}), sampling, generator))

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 200])
def test_the_scan_kernel_equals_the_reference_and_carries_the_state(num_tokens):
    scan = select_chunk_scan(GPU)
    assert scan is not ssd_scan
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(GPU)

    x, dt, state = draw(2, num_tokens, 8, 32), draw(2, num_tokens, 8), draw(2, 8, 32, 32)
    B, C = draw(2, num_tokens, 2, 32), draw(2, num_tokens, 2, 32)
    options = {
        "D": draw(8), "dt_bias": draw(8), "initial_states": state, "dt_softplus": True,
        "dt_limit": (0.01, 2.0), "return_final_states": True,
    }  # fmt: skip
    args = (x, dt, -draw(8).exp(), B, C, 64)
    for found, expected in zip(scan(*args, **options), ssd_scan(*args, **options), strict=True):
        assert found.shape == expected.shape
        assert (found.float() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.usefixtures("exact_float32")
def test_a_prompt_in_pieces_on_the_kernels():
    model, ids = gpu_model(torch.float32), random_ids()
    found = read_prompt(model, ids, Cache(model), piece_tokens=70)[0]
    expected = packed_logits(model, ids)[-1]
    assert (found - expected).abs().max() < 1e-5 * expected.std()
