"""Which blocks keep their activations for the backward pass, and which make them again: as many keep as fit.

What a block of each kind takes is measured on the model and the batch size that will train, not estimated.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

# Kinds of blocks, those first whose recomputation takes the most GPU time for the memory that it saves.
KINDS = ("moe", "linear_attention", "full_attention", "mlp")
SPARE_BYTES = 2 * 2**30  # for evaluation, and for holes between tensors


def choose_kept(costs: dict[str, int], available: Sequence[str], room_bytes: int) -> dict[str, int]:
    """How many blocks of each kind keep what they made.

    Args:
        costs: bytes that a block of each kind keeps.
        available: the kind of each block.
        room_bytes: that may be taken.
    """
    kept = {}
    for kind in sorted(costs, key=KINDS.index):
        fit = max(0, room_bytes) // max(1, costs[kind])
        kept[kind] = int(min(available.count(kind), fit))
        room_bytes -= kept[kind] * costs[kind]
    return kept


def keep_what_fits(
    model: nn.Module, device: torch.device, forward: Callable[[], torch.Tensor]
) -> dict[str, int]:
    """Let as many blocks keep their activations as the GPU has memory for, or this process's share of it;
    returns how many of each kind.

    Called on every worker together, with gradients and optimizer states in place: what a step needs beside
    the activations is in use already. All workers choose what the fullest of them can hold.

    Args:
        forward: the loss of a batch of the size that will train.
    """
    kinds = [block.block_type for block in model.model.layers]
    for block in model.model.layers:
        block.recompute = True
    forward().backward()  # whatever is made once, is made now
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    at_rest = _bytes_held(device, forward)
    forward().backward()
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction())
    room = min(free + torch.cuda.memory_reserved(device), share) - peak - SPARE_BYTES
    costs = measure_costs(model, lambda: _bytes_held(device, forward) - at_rest)
    chosen = choose_kept(costs, kinds, room)
    counts = torch.tensor([chosen.get(kind, 0) for kind in KINDS])
    dist.all_reduce(counts, op=dist.ReduceOp.MIN)
    kept = {kind: int(count) for kind, count in zip(KINDS, counts, strict=True) if kind in chosen}
    left = Counter(kept)
    for block, kind in zip(reversed(model.model.layers), reversed(kinds), strict=True):
        block.recompute = left[kind] == 0
        left[kind] -= left[kind] > 0
    torch.cuda.empty_cache()
    return kept


def measure_costs(model: nn.Module, held: Callable[[], int]) -> dict[str, int]:
    """Bytes that a block of each kind keeps where it is not made again; all blocks of `model` are, before and
    after.

    Args:
        held: what a forward pass leaves beyond the least.
    """
    costs = {}
    # The last of each kind: one before all adapters has no backward pass and keeps nothing.
    for kind, block in {block.block_type: block for block in model.model.layers}.items():
        block.recompute = False
        costs[kind] = held()
        block.recompute = True
    return costs


def _bytes_held(device: torch.device, forward: Callable[[], torch.Tensor]) -> int:
    """What a forward pass leaves for its backward pass."""
    before = torch.cuda.memory_allocated(device)
    loss = forward()
    held = torch.cuda.memory_allocated(device) - before
    del loss
    return held
