"""config.json of the demo's two tiny models: the trained base, and a shape with latent experts.

Both have all four block kinds. Dims are multiples of 64, since 4-bit blocks hold 64 values along
the last dim. What is unusual is explained at `_COMMON`.
"""

import json
from pathlib import Path

from nemo_ray.demo.tokenizer import EOS_ID, PAD_ID

_BLOCK_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}

# time_step_limit is the reference's clamp of dt. transformers (up to 5.23) ignores it and clamps at
# time_step_min instead: a minimum of 1e-6, which softplus does not reach in practice, makes both
# compute the same. time_step_min also bounds the random dt of a new model, which would then be far
# too slow to learn: time_step_floor keeps that at the usual 0.001.
_COMMON: dict[str, object] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "chunk_size": 64,
    "conv_kernel": 4,
    "eos_token_id": EOS_ID,
    "hidden_dropout": 0.0,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 32,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_groups": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "pad_token_id": PAD_ID,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "ssm_state_size": 32,
    "tie_word_embeddings": False,
    "time_step_floor": 0.001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 1e-6,
    "topk_group": 1,
    "use_bias": False,
    "use_cache": False,
    "use_conv_bias": True,
}
_BASE: dict[str, object] = {
    "vocab_size": 4096,
    "mamba_num_heads": 8,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
}
_LATENT: dict[str, object] = {
    "vocab_size": 512,
    "mamba_num_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 5.0,
}
BASE_PATTERN, LATENT_PATTERN = "MEM*EM-*E", "ME*-E"
BASE_VOCAB, LATENT_VOCAB = 4096, 512


def base_config() -> dict[str, object]:
    """The trained base: 2.6 M parameters."""
    return _config(_BASE, BASE_PATTERN)


def latent_config() -> dict[str, object]:
    """Experts behind a latent projection, as Super has them: 0.6 M parameters, random in tests."""
    return _config(_LATENT, LATENT_PATTERN)


def write_config(folder: Path, config: dict[str, object]) -> None:
    """Write config.json, sorted, with JSON's `Infinity` as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _config(shape: dict[str, object], pattern: str) -> dict[str, object]:
    """Both spellings of the layers: transformers reads the list, vLLM the pattern."""
    layers: dict[str, object] = {
        "hybrid_override_pattern": pattern,
        "layers_block_type": [_BLOCK_KINDS[letter] for letter in pattern],
        "num_hidden_layers": len(pattern),
    }
    return {**_COMMON, **shape, **layers}
