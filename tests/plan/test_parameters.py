"""Parameters counted from config.json alone are those of the built model."""

import json
from pathlib import Path

import pytest
import torch

from nemo_ray.config.schema import AdapterSection, Config
from nemo_ray.model.load import Precision, build, count_parameters
from nemo_ray.plan import count_base, count_lora, estimate_memory
from nemo_ray.plan.memory import base_bytes
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config

ADAPTERS = [
    ALL_TARGETS,
    {"adapter": "lora", "lora_r": 8, "lora_target_modules": ["q_proj", "in_proj", "up_proj"]},
    {"adapter": "lora", "lora_target_parameters": ["mixer.experts.down_proj"]},
]


@pytest.mark.parametrize("latent", [None, 32])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_counts_equal_the_models(adapter, latent):
    config = Config(base_model="x", datasets=[{"path": "y"}], **adapter)
    model, _ = build(tiny_config(latent=latent), config.adapter_config, Precision(), CPU)
    shape = tiny_config(latent=latent).to_dict()
    counts = count_parameters(model)
    assert count_lora(config, shape) == counts["trainable"]
    assert count_base(shape) == counts["total"] - counts["trainable"]


def test_the_pattern_counts_as_the_list_does():
    shape = json.loads(Path("nemo_ray/demo/assets/base/config.json").read_text())
    assert count_base(shape) == 2_619_080
    del shape["layers_block_type"]
    assert count_base(shape) == 2_619_080


@pytest.mark.parametrize("experts", [False, True])
def test_the_bytes_of_a_4bit_base_are_those_of_the_model(experts):
    keys = {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": experts}
    config = Config(base_model="x", datasets=[{"path": "y"}], lora_target_modules=["q_proj"], **keys)
    shape = tiny_config(latent=32)
    model, _ = build(shape, AdapterSection(), Precision(torch.bfloat16, torch.bfloat16, True, experts), CPU)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    kept_float32 = 2 * sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert sum(base_bytes(config, shape.to_dict(), 2)) == pytest.approx(held - kept_float32)


OF_FACTORS = ("adapters", "gradients", "optimizer")


def test_memory_follows_sharding_precision_and_recomputation():
    shape = tiny_config().to_dict()

    def estimate(
        shard: int = 1, use_gpu: bool = False, room_bytes: float | None = None, **keys: object
    ) -> dict[str, int]:
        config = Config(base_model="x", datasets=[{"path": "y"}], **(ALL_TARGETS | keys))
        return estimate_memory(config, shape, shard, use_gpu, room_bytes=room_bytes).classes

    whole = estimate()
    assert whole["weights"] == 4 * count_base(shape)
    assert estimate(use_gpu=True)["weights"] == whole["weights"] // 2
    outside = 2 * 4 * shape["vocab_size"] * shape["hidden_size"]  # whole on each worker, as factors are
    spread = estimate(shard=4)
    assert spread["weights"] == (whole["weights"] - outside) // 4 + outside
    assert [spread[name] for name in OF_FACTORS] == [whole[name] for name in OF_FACTORS]
    everything = estimate(shard=4, room_bytes=0)
    assert everything["weights"] == whole["weights"] // 4
    assert [everything[name] for name in OF_FACTORS] == [whole[name] // 4 for name in OF_FACTORS]
    assert spread["communication"] > everything["communication"] > 0
    assert estimate(gradient_checkpointing=True)["activations"] < whole["activations"]
    assert estimate(adapter=None)["optimizer"] == 8 * count_base(shape)
