"""Greedy completion without a cache: what the cached one is held against."""

from collections.abc import Callable, Sequence

import torch

from nemo_ray.model.batch import PackedBatch


def complete_greedily(
    packed_logits: Callable[[PackedBatch], torch.Tensor],
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    device: torch.device,
) -> list[int]:
    """Token ids that follow `prompt_ids`, without the end token; no cache: each token is a forward of all.

    Every rank must call it with the same prompt where the model is sharded.
    """
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            batch = PackedBatch.from_lengths(torch.tensor([ids], device=device), [[len(ids)]])
            token = int(packed_logits(batch)[0, -1].argmax())
            if token in eos_ids:
                break
            ids.append(token)
    return ids[len(prompt_ids) :]
