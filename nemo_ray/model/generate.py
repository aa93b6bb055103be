"""Greedy completion with the packed forward: no cache, right on any sharding, for short prompts."""

from collections.abc import Callable, Sequence

import torch

from nemo_ray.model.batch import PackedBatch


@torch.no_grad()
def complete_greedily(
    packed_logits: Callable[[PackedBatch], torch.Tensor],
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    device: torch.device,
) -> list[int]:
    """Token ids that follow `prompt_ids`, without the end token.

    Every rank must call it with the same prompt where the model is sharded: each token is one forward of all.
    """
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        batch = PackedBatch.from_lengths(torch.tensor([ids], device=device), [[len(ids)]])
        token = int(packed_logits(batch)[0, -1].argmax())
        if token in eos_ids:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]
