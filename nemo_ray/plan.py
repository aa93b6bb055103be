"""What a run will take, known before it runs: parameters and memory, from config.json alone.

Owns arithmetic only; imports neither torch nor transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.targets import (
    block_types,
    expert_paths,
    find_targets,
    linear_paths,
    saved_modules,
    strength_of,
)

FLOAT32_BYTES = 4
BF16_BYTES = 2


def linear_shapes(model: Mapping[str, Any], kind: str) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer of a block of `kind`, by the name that LoRA targets use."""
    hidden = model["hidden_size"]
    if kind == "linear_attention":
        inner = model["mamba_num_heads"] * model["mamba_head_dim"]
        states = 2 * model["n_groups"] * model["ssm_state_size"]
        return {
            "in_proj": (2 * inner + states + model["mamba_num_heads"], hidden),
            "out_proj": (hidden, inner),
        }
    if kind == "full_attention":
        query = model["num_attention_heads"] * model["head_dim"]
        keys = model["num_key_value_heads"] * model["head_dim"]
        return {
            "q_proj": (query, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, query),
        }
    width = model["moe_shared_expert_intermediate_size"] if kind == "moe" else model["intermediate_size"]
    shapes = {"up_proj": (width, hidden), "down_proj": (hidden, width)}
    latent = model.get("moe_latent_size")
    if kind == "moe" and latent:
        shapes |= {"fc1_latent_proj": (latent, hidden), "fc2_latent_proj": (hidden, latent)}
    return shapes


def expert_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of one routed expert's projections."""
    inputs = model.get("moe_latent_size") or model["hidden_size"]
    return {
        "up_proj": (model["moe_intermediate_size"], inputs),
        "down_proj": (inputs, model["moe_intermediate_size"]),
    }


def count_base(model: Mapping[str, Any]) -> int:
    """Number of the base's parameters."""
    hidden, total = model["hidden_size"], 0
    for kind in block_types(model):
        total += hidden + sum(out * into for out, into in linear_shapes(model, kind).values())
        if kind == "linear_attention":
            heads = model["mamba_num_heads"]
            inner = heads * model["mamba_head_dim"]
            channels = inner + 2 * model["n_groups"] * model["ssm_state_size"]
            total += (
                channels * (model["conv_kernel"] + int(model.get("use_conv_bias", True))) + inner + 3 * heads
            )
        elif kind == "moe":
            experts = model["n_routed_experts"]
            total += experts * (hidden + sum(out * into for out, into in expert_shapes(model).values()))
    return int(total + hidden + 2 * model["vocab_size"] * hidden)


def count_lora(config: Config, model: Mapping[str, Any]) -> int:
    """Number of parameters that an adapter trains: LoRA factors, and modules that train whole.

    Raises: ConfigError as `find_targets` does.
    """
    adapter, kinds = config.adapter_config, block_types(model)
    modules, parameters = find_targets(adapter, linear_paths(model), expert_paths(model))
    total = len(saved_modules(adapter)) * model["vocab_size"] * model["hidden_size"]
    for path in modules:
        kind, name = kinds[int(path.split(".")[2])], path.rpartition(".")[2]
        total += strength_of(adapter, path).rank * sum(linear_shapes(model, kind)[name])
    for path in parameters:
        rank, name = strength_of(adapter, path).rank, path.rpartition(".")[2]
        total += model["n_routed_experts"] * rank * sum(expert_shapes(model)[name])
    return int(total)


def quantized_bits(num_weights: int, groups: int) -> float:
    """Bits a weight in NF4 with double quantization: the packed values, a byte for each 64, padded to 256 a
    group, and a float32 for each 256 of those and for the group's offset."""
    blocks = -(-num_weights // groups // 64)
    scale_blocks = -(-blocks // 256)
    return 8 * (32 * blocks + 256 * scale_blocks + 4 * (scale_blocks + 1)) / (num_weights / groups)


def base_bytes(config: Config, model: Mapping[str, Any], compute_bytes: int) -> float:
    """Bytes of the base's weights: what is in 4 bits, and the rest as it computes."""
    kinds, four_bit, num_quantized = block_types(model), 0.0, 0
    shapes = []
    if config.load_in_4bit:
        shapes += [
            (shape, math.gcd(shape[0], 64), 1) for k in kinds for shape in linear_shapes(model, k).values()
        ]
    if config.quantize_moe_experts:
        experts = model["n_routed_experts"]
        for _ in range(kinds.count("moe")):
            shapes += [(shape, 1, experts) for shape in expert_shapes(model).values()]
    for (rows, columns), groups, copies in shapes:
        num_quantized += copies * rows * columns
        four_bit += copies * rows * columns * quantized_bits(rows * columns, groups) / 8
    return four_bit + (count_base(model) - num_quantized) * compute_bytes


def estimate_memory(config: Config, model: Mapping[str, Any], shard: int, use_gpu: bool) -> dict[str, int]:
    """Bytes on each worker by class, where `shard` workers hold a copy of the weights together: weights,
    adapters, gradients, optimizer, activations.

    Activations are a rough bound: what each block keeps (its input only, with gradient checkpointing), the
    widest block's inside once, and one chunk of logits with its gradient.
    """
    base, lora = count_base(model), count_lora(config, model) if config.adapter else 0
    bf16 = config.bf16 is not False and (use_gpu or config.bf16 is True)
    compute_bytes = BF16_BYTES if bf16 else FLOAT32_BYTES
    weights = base_bytes(config, model, compute_bytes if config.adapter else FLOAT32_BYTES)
    state_bytes = 2 if config.optimizer == "adamw_8bit" else 2 * FLOAT32_BYTES
    trained = lora if config.adapter else base
    tokens = config.micro_batch_size * config.sequence_len
    hidden = model["hidden_size"]
    widest = 0
    inside = 0
    for kind in block_types(model):
        width = 4 * hidden + 2 * sum(out for out, _ in linear_shapes(model, kind).values())
        if kind == "moe":
            width += model["num_experts_per_tok"] * 3 * sum(out for out, _ in expert_shapes(model).values())
        widest = max(widest, width)
        inside += hidden if config.gradient_checkpointing else width
    logits = 3 * min(tokens, 512) * model["vocab_size"] * FLOAT32_BYTES
    return {
        "weights": int(weights // shard),
        "adapters": lora * FLOAT32_BYTES // shard,
        "gradients": trained * FLOAT32_BYTES // shard,
        "optimizer": trained * state_bytes // shard,
        "activations": tokens * (inside + widest) * compute_bytes + logits,
    }
