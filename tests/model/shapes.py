"""Tiny Nemotron-H shapes for the model tests: all four block kinds, with and without latent experts."""

import torch
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.load import Precision, build, fill

CPU = torch.device("cpu")


def tiny_config(latent: int | None = None, pattern: str = "ME*-ME", **overrides: object) -> NemotronHConfig:
    """A shape of under 0.2 M parameters whose dims are multiples of 16 bytes."""
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "hybrid_override_pattern": pattern,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "conv_kernel": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "moe_latent_size": latent,
        "routed_scaling_factor": 2.5,
        "time_step_min": 1e-6,
        "time_step_limit": (0.0, float("inf")),
        "initializer_range": 0.1,
    }
    return NemotronHConfig(**(values | overrides))


ALL_TARGETS = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_target_linear": True,
    "lora_target_parameters": ("experts.up_proj", "experts.down_proj"),
}


def tiny_model(
    config: NemotronHConfig | None = None, adapter: dict[str, object] | None = None, seed: int = 3
) -> NemotronHForCausalLM:
    """A patched, filled model on the CPU; LoRA B is random, so that adapters act."""
    section = AdapterSection(**(adapter or {}))
    model, _ = build(config or tiny_config(), section, Precision(), CPU)
    fill(model, None, seed=seed, device=CPU, adapter_seed=seed)
    randomize_lora(model)
    return model


@torch.no_grad()
def randomize_lora(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
