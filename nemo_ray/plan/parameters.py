"""How many parameters a model and its adapter have, by kind, from config.json alone. Arithmetic only."""

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


def count_by_kind(model: Mapping[str, Any]) -> dict[str, int]:
    """Number of the base's parameters by what they are."""
    hidden, kinds = model["hidden_size"], block_types(model)
    counts = {
        "embedding table": model["vocab_size"] * hidden,
        "output head": model["vocab_size"] * hidden,
        "norms": hidden * (len(kinds) + 1),
    }
    names = {
        "linear_attention": "Mamba-2",
        "full_attention": "attention",
        "moe": "shared experts",
        "mlp": "MLP",
    }
    for kind in kinds:
        own = sum(out * into for out, into in linear_shapes(model, kind).values())
        if kind == "linear_attention":
            heads = model["mamba_num_heads"]
            inner = heads * model["mamba_head_dim"]
            channels = inner + 2 * model["n_groups"] * model["ssm_state_size"]
            own += (
                channels * (model["conv_kernel"] + int(model.get("use_conv_bias", True))) + inner + 3 * heads
            )
        elif kind == "moe":
            experts = model["n_routed_experts"]
            each = sum(out * into for out, into in expert_shapes(model).values())
            counts["routed experts"] = counts.get("routed experts", 0) + experts * each
            counts["routers"] = counts.get("routers", 0) + experts * hidden
        counts[names[kind]] = counts.get(names[kind], 0) + own
    return {name: int(count) for name, count in counts.items()}


def count_base(model: Mapping[str, Any]) -> int:
    """Number of the base's parameters."""
    return sum(count_by_kind(model).values())


def count_active(model: Mapping[str, Any]) -> int:
    """Those that one token meets: all but the embedding table and the experts that were not chosen."""
    counts = count_by_kind(model)
    total = sum(counts.values()) - counts["embedding table"]
    if "routed experts" in counts:
        idle = model["n_routed_experts"] - model["num_experts_per_tok"]
        total -= counts["routed experts"] * idle // model["n_routed_experts"]
    return total


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
