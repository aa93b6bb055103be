"""What a run takes of each GPU's memory, from config.json and the configuration. Arithmetic only.

The peak is reached in the backward pass of a block of the widest kind, when all other blocks' inputs are
still there. Tokens count with what this package keeps of them (model/experts.py, ssd.py, norm.py), so the
formulas change with that code; docs/planning.md compares them with what GPUs said.

Shapes: H hidden size, I expert size, K experts a token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.plan.parameters import (
    count_base,
    count_lora,
    expert_shapes,
    linear_shapes,
    quantized_bits,
)
from nemo_ray.targets import block_types

FLOAT32_BYTES = 4
BF16_BYTES = 2
FULL = 0.95
"""Of a GPU's memory, what an estimate may take to count as fitting."""
LOSS_TOKENS = 1024
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker at the worst moment."""

    classes: Mapping[str, int]
    """By what they are."""
    peak: int
    """Of all classes together: gradients fill up while activations go, but where both lie in a CUDA graph."""
    factors_whole: bool
    """Whether each worker holds all of what an adapter trains, and the base alone is spread."""

    @property
    def above_weights(self) -> int:
        """What comes to the base's weights."""
        return self.peak - self.classes["weights"] - self.classes["quantized weights"]


def _quantized_shapes(config: Config, model: Mapping[str, Any]) -> list[tuple[tuple[int, int], int, int]]:
    """(shape, groups of rows, copies) of every weight that is held in 4 bits."""
    kinds = block_types(model)
    shapes: list[tuple[tuple[int, int], int, int]] = []
    if config.load_in_4bit:
        shapes += [
            (shape, math.gcd(shape[0], 64), 1) for k in kinds for shape in linear_shapes(model, k).values()
        ]
    if config.quantize_moe_experts:
        experts = model["n_routed_experts"]
        for _ in range(kinds.count("moe")):
            shapes += [(shape, 1, experts) for shape in expert_shapes(model).values()]
    return shapes


def base_bytes(config: Config, model: Mapping[str, Any], compute_bytes: int) -> tuple[float, float]:
    """Bytes of the base's weights: of what is in 4 bits, and of the rest, as it computes."""
    four_bit, num_quantized = 0.0, 0
    for (rows, columns), groups, copies in _quantized_shapes(config, model):
        num_quantized += copies * rows * columns
        four_bit += copies * rows * columns * quantized_bits(rows * columns, groups) / 8
    return four_bit, (count_base(model) - num_quantized) * compute_bytes


def shard_sizes(config: Config, num_workers: int) -> list[int]:
    """How many workers may share a copy of the weights: what the configuration says, else all that divide."""
    if config.dp_shard_size:
        return [config.dp_shard_size]
    if config.dp_replicate_size:
        return [num_workers // config.dp_replicate_size]
    return [size for size in range(1, num_workers + 1) if num_workers % size == 0]


def kept_width(model: Mapping[str, Any], kind: str) -> int:
    """Numbers a token that a block of `kind` keeps for its backward pass, its input among them."""
    hidden = int(model["hidden_size"])
    shapes = linear_shapes(model, kind)
    if kind == "moe":
        inside = model["num_experts_per_tok"] * model["moe_intermediate_size"]
        return int(2 * hidden + shapes["up_proj"][0] + inside + (model.get("moe_latent_size") or 0))
    if kind == "linear_attention":  # with LoRA on it; the scan keeps its output before the norm
        return hidden + shapes["in_proj"][0] + hidden + 2 * shapes["out_proj"][1]
    if kind == "full_attention":
        heads = sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj"))
        return 2 * hidden + heads + shapes["o_proj"][1]
    return 2 * hidden + shapes["up_proj"][0]


def backward_width(model: Mapping[str, Any], kind: str) -> int:
    """Numbers a token that the backward pass of a block of `kind` has beside those, at its peak."""
    hidden = int(model["hidden_size"])
    shapes = linear_shapes(model, kind)
    if kind == "moe":
        slot = model["moe_intermediate_size"] + expert_shapes(model)["up_proj"][1]
        return int(model["num_experts_per_tok"] * slot + 2 * hidden + 2 * shapes["up_proj"][0])
    if kind == "linear_attention":
        return shapes["in_proj"][0] + 2 * shapes["out_proj"][1] + 2 * hidden
    return 2 * hidden + sum(out for out, _ in shapes.values())


def estimate_memory(
    config: Config,
    model: Mapping[str, Any],
    shard: int,
    use_gpu: bool,
    tokens: int | None = None,
    room_bytes: float | None = None,
) -> Memory:
    """Of a worker, where `shard` workers hold a copy of the weights together.

    Args:
        tokens: of a micro-batch; the configuration's by default.
        room_bytes: of a worker's GPU. Where a spread base with whole factors, which is faster, takes more,
            the factors are sharded too.
    """
    whole = _estimate(config, model, shard, use_gpu, tokens, factors_whole=config.adapter is not None)
    if not whole.factors_whole or shard == 1 or room_bytes is None or whole.peak <= room_bytes:
        return whole
    return _estimate(config, model, shard, use_gpu, tokens, factors_whole=False)


def _estimate(
    config: Config,
    model: Mapping[str, Any],
    shard: int,
    use_gpu: bool,
    tokens: int | None,
    factors_whole: bool,
) -> Memory:
    base = count_base(model)
    trained = count_lora(config, model) if config.adapter else base
    bf16 = config.bf16 is not False and (use_gpu or config.bf16 is True)
    compute_bytes = BF16_BYTES if bf16 else FLOAT32_BYTES
    four_bit, dense = base_bytes(config, model, compute_bytes if config.adapter else FLOAT32_BYTES)
    quantized = _quantized_shapes(config, model)
    # Made whole for one product; the bank of all experts is one weight.
    experts = [math.prod(shape) * copies for shape, _, copies in quantized if copies > 1]
    whole = max([*experts, *(math.prod(shape) for shape, _, copies in quantized if copies == 1)], default=0)
    state_bytes = 2 if config.optimizer == "adamw_8bit" else 2 * FLOAT32_BYTES
    if tokens is None:
        tokens = config.micro_batch_size * config.sequence_len
    kinds = block_types(model)
    backward = max(backward_width(model, kind) for kind in set(kinds))
    asked = config.gradient_checkpointing  # auto: keep more on a GPU, but only what is left
    if use_gpu if isinstance(asked, str) else asked:
        kept = (len(kinds) + 1) * model["hidden_size"] + max(kept_width(model, kind) for kind in set(kinds))
    else:
        kept = sum(kept_width(model, kind) for kind in kinds)
    # A frozen base is spread but for the embeddings and the head; what an adapter trains is not spread.
    outside = 2 * model["vocab_size"] * model["hidden_size"] * compute_bytes if factors_whole else 0
    holders = 1 if factors_whole else shard
    classes = {
        "weights": int((dense - outside) // shard + outside),
        "quantized weights": int(four_bit // shard),
        "one of them whole": whole * compute_bytes,
        "adapters": trained * FLOAT32_BYTES // holders if config.adapter else 0,
        "gradients": trained * FLOAT32_BYTES // holders,
        "optimizer": trained * state_bytes // holders,
        "activations": int(tokens * (kept + backward) * compute_bytes),
        "logits": 2 * min(tokens, LOSS_TOKENS) * model["vocab_size"] * compute_bytes,
        "communication": _gathered(config, model, compute_bytes, factors_whole) if shard > 1 else 0,
    }
    total, together = sum(classes.values()), classes["activations"] + classes["logits"]
    factors_alone = config.adapter is not None and not config.lora_modules_to_save
    recorded = config.cuda_graphs and factors_alone and use_gpu and (factors_whole or shard == 1)
    peak = total if recorded else total - min(classes["gradients"], together)
    return Memory(classes, peak, factors_whole)


def _gathered(config: Config, model: Mapping[str, Any], compute_bytes: int, frozen: bool) -> int:
    """Bytes of the blocks that are whole at a time: of a frozen base two of each kind, by FSDP2 the two
    largest."""
    held = compute_bytes if config.adapter else FLOAT32_BYTES
    kinds, sizes = block_types(model), []
    for kind in set(kinds):
        count = sum(out * into for out, into in linear_shapes(model, kind).values())
        bits = 4.2 if config.load_in_4bit else 8 * held
        size = count * bits / 8
        if kind == "moe":
            bits = 4.2 if config.quantize_moe_experts else 8 * held
            each = sum(out * into for out, into in expert_shapes(model).values())
            size += model["n_routed_experts"] * each * bits / 8
        sizes.append(int(size) * min(2, kinds.count(kind)))
    return sum(sizes) if frozen else max(sizes)


def most_tokens(config: Config, model: Mapping[str, Any], shard: int, room_bytes: float) -> int:
    """The longest micro-batch, in tokens, that fits into `room_bytes` of a GPU; 0 where none does."""

    def fits(tokens: int) -> bool:
        found = estimate_memory(config, model, shard, use_gpu=True, tokens=tokens, room_bytes=room_bytes)
        return found.peak <= room_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < 2**26 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
