"""Does the patched model compute what it should on a device? A model of every kind of block, in a second."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import NemotronHConfig

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.lora import LoraTargets
from nemo_ray.model.selftest import random_ids, self_test

LENGTHS = (37, 91)  # with an edge inside a chunk
# Latent experts as Super has them; sizes that every kernel takes.
SHAPE = {
    "hybrid_override_pattern": "ME*-ME",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "chunk_size": 64,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 64,
    "initializer_range": 0.1,
}
EXPERTS = ("experts.up_proj", "experts.down_proj")


def measure(device: torch.device) -> float:
    """Run the self-test in float32, and return how far the logits of a pack are from those of the torch
    reference on the CPU, as a share of their scale.

    Raises: PatchError
    """
    cpu = torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    (reference, _), (model, targets) = _model(cpu), _model(device)
    model.load_state_dict(reference.state_dict())
    ids = random_ids(SHAPE["vocab_size"], LENGTHS)
    with untuned() if device.type == "cuda" else contextlib.nullcontext():
        with torch.no_grad():
            expected, found = (
                one.eval()
                .packed_logits(PackedBatch.from_lengths(ids.to(place), [list(LENGTHS)]))
                .float()
                .cpu()
                for one, place in ((reference, cpu), (model, device))
            )
        self_test(model, targets, device, torch.float32)
    return float((found - expected).abs().max() / expected.std())


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Let Triton's kernels take their smallest tiles: to compile and time all takes minutes, which only a run
    is worth."""
    from triton.runtime.autotuner import Autotuner, Config

    prune = Autotuner.prune_configs

    def size(config: Config) -> int:
        return config.num_stages * math.prod(v for v in config.kwargs.values() if isinstance(v, int))

    def smallest(tuner: Autotuner, keys: dict[str, Any]) -> list[Config]:
        return [min(prune(tuner, keys), key=size)]

    Autotuner.prune_configs = smallest
    try:
        yield
    finally:
        Autotuner.prune_configs = prune


def _model(device: torch.device) -> tuple[torch.nn.Module, LoraTargets | None]:
    adapter = AdapterSection(
        adapter="lora", lora_r=4, lora_target_linear=True, lora_target_parameters=EXPERTS
    )
    model, targets = build(NemotronHConfig(**SHAPE), adapter, Precision(), device)
    fill(model, None, seed=1, device=device, adapter_seed=1)
    return model, targets
