"""Attention over packed documents: causal within each, blind across.

Shapes: B packs, T tokens, Q query heads, V key/value heads, E head dim. Nemotron-H has no rotary embedding.
"""

import inspect
from functools import cache

import torch
import torch.nn.functional as F

from nemo_ray.model.batch import PackedBatch


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch, scale: float
) -> torch.Tensor:
    """Softmax attention of each token over the earlier tokens of its own document.

    Args:
        query: (B, T, Q, E).
        key, value: (B, T, V, E), Q a multiple of V.

    Returns: (B, T, Q, E).
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, batch, scale)
    repeats = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
    return _block_causal(query, key, value, batch.seq_idx, scale)


@cache
def _grouped_heads() -> dict[str, bool]:
    """torch 2.11 takes fewer key/value heads as they are, 2.13 where it is told of them."""
    from torch.nn.attention.varlen import varlen_attn

    name = "enable_gqa"
    return {name: True} if name in inspect.signature(varlen_attn).parameters else {}


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch, scale: float
) -> torch.Tensor:
    """Flash attention over the flattened tokens; never forms a (T, T) matrix."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        cu_seq_q=batch.cu_seqlens,
        cu_seq_k=batch.cu_seqlens,
        max_q=batch.max_seqlen,
        max_k=batch.max_seqlen,
        scale=scale,
        window_size=(-1, 0),
        **_grouped_heads(),
    )
    return out.view(query.shape)


def _block_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seq_idx: torch.Tensor, scale: float
) -> torch.Tensor:
    """The reference: dense attention under a mask of documents, any device and dtype."""
    num_tokens = seq_idx.shape[1]
    same = seq_idx.unsqueeze(-1) == seq_idx.unsqueeze(-2)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=seq_idx.device).tril()
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=(same & causal).unsqueeze(1), scale=scale
    )
    return out.transpose(1, 2)
