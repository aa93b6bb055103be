"""The estimates beside what GPUs said (docs/planning.md): nothing in them was fitted to these figures."""

from typing import Any

import pytest

from benchmarks import sizes
from nemo_ray.config.schema import Config
from nemo_ray.plan.facts import find_shape
from nemo_ray.plan.gpus import GIB, GPUS
from nemo_ray.plan.memory import estimate_memory, most_tokens
from nemo_ray.plan.options import options
from nemo_ray.plan.speed import BY_ROWS, COPIES, IN_TURNS, MEASURED, SHARDED, estimate_speed

NANO, SUPER = "nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BILLION = "a hybrid of 1.4 B"
MAMBA = (*ATTENTION, "in_proj", "out_proj")
EXPERTS = ("experts.up_proj", "experts.down_proj")
FOUR_BIT = {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}


def config(model: str, tokens: int, modules: tuple[str, ...], experts: bool, **keys: object) -> Config:
    defaults = {"adapter": "lora", "lora_r": 16, "gradient_checkpointing": True, "cuda_graphs": False}
    return Config(
        base_model=model,
        datasets=[{"path": "y"}],
        sequence_len=tokens,
        lora_target_modules=modules,
        lora_target_parameters=EXPERTS if experts else (),
        **defaults | keys,
    )


def shape_of(model: str) -> dict[str, Any]:
    if model == BILLION:
        return find_shape(NANO)[0] | sizes.BILLION | {"vocab_size": 131_072}
    return find_shape(model)[0]


# GiB of reserved memory, everything recomputed.
PEAKS = [
    (NANO, 8192, ATTENTION, True, {"cuda_graphs": True}, 68.8),
    (NANO, 16_384, ATTENTION, True, {"cuda_graphs": True}, 72.1),
    (NANO, 8192, MAMBA, True, {}, 67.4),
    (NANO, 32_768, MAMBA, True, {}, 77.7),
    (NANO, 8192, MAMBA, True, FOUR_BIT, 25.9),
    (NANO, 4096, MAMBA, True, FOUR_BIT | {"optimizer": "adamw_8bit"}, 22.4),
    (SUPER, 8192, MAMBA, False, FOUR_BIT, 71.9),
    (SUPER, 14_336, MAMBA, False, FOUR_BIT, 78.3),
    # Settings that no formula was checked with before.
    (NANO, 4096, ATTENTION, True, FOUR_BIT | {"lora_r": 64, "cuda_graphs": True}, 44.97),
    (NANO, 4096, ATTENTION, True, {"micro_batch_size": 2, "cuda_graphs": True}, 68.75),
    (BILLION, 8192, MAMBA, True, {"cuda_graphs": True}, 4.76),
]


@pytest.mark.parametrize(("model", "tokens", "modules", "experts", "keys", "peak_gib"), PEAKS)
def test_memory(model, tokens, modules, experts, keys, peak_gib):
    given = config(model, tokens, modules, experts, **keys)
    found = estimate_memory(given, shape_of(model), 1, use_gpu=True)
    weights = found.peak - found.above_weights
    assert found.peak / GIB == pytest.approx(peak_gib, rel=0.05)
    assert found.above_weights == pytest.approx(peak_gib * GIB - weights, rel=0.10)


def test_the_longest_pack_of_an_h100():
    """36,864 tokens did not fit, 32,768 did."""
    shape, _ = find_shape(NANO)
    most = most_tokens(config(NANO, 8192, MAMBA, True), shape, 1, GPUS["h100"].memory_bytes)
    assert 32_768 <= most < 1.15 * 36_864


SPEEDS = [(NANO, run.tokens, {}, run) for run in MEASURED if not run.four_bit]
SPEEDS += [(NANO, 8192, FOUR_BIT, MEASURED[3]), (SUPER, 8192, FOUR_BIT, MEASURED[4])]


@pytest.mark.parametrize(("model", "tokens", "keys", "run"), SPEEDS)
def test_speed_of_what_was_measured(model, tokens, keys, run):
    shape, _ = find_shape(model)
    given = config(model, tokens, ATTENTION, model == NANO, cuda_graphs=True, **keys)
    given = given.model_copy(update={"gradient_checkpointing": "auto"})
    found = estimate_speed(given, shape, GPUS["h100"], tokens)
    assert found.tokens_per_s == pytest.approx(run.tokens_per_s, rel=0.01) and run.what in found.source


@pytest.mark.parametrize(
    ("gpus", "keys", "share"),
    [
        (2, {}, COPIES),
        (2, {"dp_shard_size": 2}, IN_TURNS),
        (4, {"dp_shard_size": 4}, BY_ROWS),
        (2, {"dp_shard_size": 2, "lora_r": 128}, SHARDED),
    ],
    ids=["copies", "a spread base", "over more", "factors sharded too"],
)
def test_gpus_are_less_than_so_many_times_one(gpus, keys, share) -> None:
    """As measured by layout; what an adapter trains is sharded too where a GPU has no room for all of it."""
    shape, _ = find_shape(NANO)
    found = options(config(NANO, 8192, ATTENTION, True, **keys), shape, GPUS["h100"], gpus)[0]
    assert found.tokens_per_s == pytest.approx(gpus * share * found.speed.tokens_per_s)
