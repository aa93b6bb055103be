"""Which blocks keep their activations for the backward pass, and which make them again: as many keep as fit.

What a block of each kind takes is measured on the model and the batch size that will train, not estimated;
and what the choice left free is measured again: the last blocks are at the peak, and those which keep need
less there than those which make theirs again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

# Kinds of blocks, those first whose recomputation takes the most GPU time for the memory that it saves.
KINDS = ("moe", "linear_attention", "full_attention", "mlp")
SPARE_BYTES = 7 * 2**28  # for holes between tensors, and for what uses the GPU beside training


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
    for block in model.model.layers:
        block.recompute = True
    forward().backward()  # whatever is made once, is made now
    dist.all_reduce(torch.zeros((), device=device))  # NCCL's buffers too
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction())
    limit = min(free + torch.cuda.memory_reserved(device), share) - SPARE_BYTES
    at_rest = _bytes_held(device, forward)
    costs = measure_costs(model, lambda: _bytes_held(device, forward) - at_rest)
    return keep_most(model, costs, limit, lambda: _peak_bytes(device, forward), device)


def keep_most(
    model: nn.Module, costs: dict[str, int], limit: int, peak: Callable[[], int], device: torch.device
) -> dict[str, int]:
    """Let more blocks keep theirs until `peak()` leaves room up to `limit` for no other; at first all of them
    make theirs again. Workers choose together.

    Args:
        costs: bytes that a block of each kind keeps.
        limit: bytes.

    Returns: how many of each kind keep theirs.
    """
    kinds = [block.block_type for block in model.model.layers]
    kept: Counter[str] = Counter()
    while True:
        left = [kind for kind in costs for _ in range(kinds.count(kind) - kept[kind])]
        more = choose_kept(costs, left, limit - peak())
        counts = torch.tensor([more.get(kind, 0) for kind in KINDS], device=device)
        dist.all_reduce(counts, op=dist.ReduceOp.MIN)
        if not counts.any():
            return {kind: kept[kind] for kind in KINDS if kind in costs}
        kept.update(dict(zip(KINDS, counts.tolist(), strict=True)))
        _keep_last(model, kept)


def _keep_last(model: nn.Module, kept: Mapping[str, int]) -> None:
    """Let the last blocks of each kind keep theirs, so many as `kept` says; their backward pass is first."""
    left = Counter(kept)
    for block in reversed(model.model.layers):
        block.recompute = left[block.block_type] == 0
        left[block.block_type] -= left[block.block_type] > 0


def _peak_bytes(device: torch.device, forward: Callable[[], torch.Tensor]) -> int:
    """The most that a forward and a backward pass hold, and all that is held already."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    forward().backward()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return peak


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
