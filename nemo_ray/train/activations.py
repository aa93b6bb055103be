"""Which blocks keep their activations for the backward pass, which move them to the host, and which make them
again: as many keep as fit.

What a block of each kind takes is measured on the model and the batch size that will train, not estimated;
and what the choice left free is measured again: the last blocks are at the peak, and those which keep need
less there than those which make theirs again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from nemo_ray.train.offload import BEHIND, HostActivations, movable_bytes
from nemo_ray.train.reached import first_reached

# Kinds of blocks, those first whose recomputation takes the most GPU time for the memory that it saves.
KINDS = ("moe", "linear_attention", "full_attention", "mlp")
SPARE_BYTES = 2**31  # for holes between tensors, and for what uses the GPU beside training
_CHOICES = 5
Counts = dict[str, int]
"""Of blocks, by kind."""


@dataclass(frozen=True)
class Kept:
    """Whose activations are not made again."""

    on_gpu: Counts
    on_host: Counts


def choose_kept(costs: Counts, available: Sequence[str], room_bytes: int) -> Counts:
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
    model: nn.Module,
    device: torch.device,
    forward: Callable[[], torch.Tensor],
    moving: HostActivations | None = None,
    untracked_bytes: int = 0,
) -> Kept:
    """Let as many blocks keep their activations as the GPU has memory for, or this process's share of it; of
    the others `moving`, if it is given, moves as many as can be copied while the rest computes.

    Called on every worker together, with gradients and optimizer states in place: what a step needs beside
    the activations is in use already. All workers choose what the fullest of them can hold.

    Args:
        forward: the loss of a batch of the size that will train.
        untracked_bytes: that this process holds beside torch's allocator.
    """
    for block in model.model.layers:
        block.recompute = True
    forward().backward()  # whatever is made once, is made now
    dist.all_reduce(torch.zeros((), device=device))  # NCCL's buffers too
    torch.cuda.empty_cache()
    limit = limit_bytes(device, untracked_bytes)
    at_rest = _bytes_held(device, forward)
    costs = measure_costs(model, lambda: _bytes_held(device, forward) - at_rest)

    def peak() -> int:
        return _peak_bytes(device, forward)

    if moving is None:
        return Kept(keep_most(model, costs, limit, peak, device), {})

    def movable(wanted: int) -> int:
        dist.all_reduce(torch.zeros((), device=device))  # workers of a host copy at the same time
        return movable_bytes(device, forward, wanted)

    return keep_or_move(model, costs, limit, peak, moving, movable, first_reached(model))


def limit_bytes(device: torch.device, untracked_bytes: int) -> int:
    """What torch's allocator may hold: all that nobody else has, or this process's share of the GPU."""
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction()) - untracked_bytes
    return min(free + torch.cuda.memory_reserved(device), share) - SPARE_BYTES


def keep_most(
    model: nn.Module,
    costs: Counts,
    limit: int,
    peak: Callable[[], int],
    device: torch.device,
    moved: Collection[int] = (),
) -> Counts:
    """Let more blocks keep theirs until `peak()` leaves room up to `limit` for no other; at first all of them
    make theirs again, but those that are `moved`. Workers choose together.

    Args:
        costs: bytes that a block of each kind keeps.
        limit: bytes.

    Returns: how many of each kind keep theirs.
    """
    blocks = [block for index, block in enumerate(model.model.layers) if index not in moved]
    kinds = [block.block_type for block in blocks]
    kept: Counter[str] = Counter()
    while True:
        left = [kind for kind in costs for _ in range(kinds.count(kind) - kept[kind])]
        more = _least(choose_kept(costs, left, limit - peak()), device)
        if not more:
            return {kind: kept[kind] for kind in KINDS if kind in costs}
        kept.update(more)
        _keep_last(blocks, kept)


def keep_or_move(
    model: nn.Module,
    costs: Counts,
    limit: int,
    peak: Callable[[], int],
    moving: HostActivations,
    movable: Callable[[int], int],
    first: int,
) -> Kept:
    """As `keep_most`; and of what makes theirs again then, blocks of up to `movable(bytes)` are moved
    instead, from block `first` on.

    What is on its way lies on the GPU as well, and fewer may keep theirs there: it is chosen again, a few
    times, what to move. Blocks before those which keep theirs are moved: at the peak, when all of these are
    held, nothing is on its way.
    """
    device, layers = moving.device, model.model.layers
    kinds = [block.block_type for block in layers]
    room = limit - peak()
    kept = keep_most(model, costs, limit, peak, device)
    if not any(block.recompute for block in layers[first:]):
        return Kept(kept, {})
    most_bytes, blocks = movable(sum(costs[kind] for kind in kinds[first:])), set[int]()

    def choose() -> set[int]:
        places = {kind: _places(kinds, kind, first)[: -kept[kind] or None] for kind in costs}
        left = [kind for kind in costs for _ in places[kind]]
        most = most_bytes
        while True:
            counts = choose_kept(costs, left, most)
            mine = _spread(places, counts)
            if not mine or _most_on_their_way(kinds, costs, mine) <= room:
                return _spread(places, _least(counts, device))
            most = most * 9 // 10

    def apply(blocks: set[int]) -> Counts:
        moving.move(blocks)
        for index, block in enumerate(layers):
            block.recompute = index not in blocks
        return keep_most(model, costs, limit, peak, device, blocks)

    for _ in range(_CHOICES):
        chosen = choose()
        if chosen == blocks:
            break
        blocks = chosen
        kept = apply(blocks)
    while blocks and _lowest(limit - peak(), device) < 0:
        most_bytes //= 2
        blocks = choose()
        kept = apply(blocks)
    return Kept(kept, dict(Counter(kinds[index] for index in sorted(blocks))))


def _places(kinds: Sequence[str], kind: str, first: int) -> list[int]:
    """Where the blocks of a kind are, from block `first` on."""
    return [index for index, its in enumerate(kinds) if its == kind and index >= first]


def _most_on_their_way(kinds: Sequence[str], costs: Counts, moved: Collection[int]) -> int:
    """Bytes of the moved blocks that lie on the GPU as well, at most."""
    sizes = [costs[kind] if index in moved else 0 for index, kind in enumerate(kinds)]
    return max(sum(sizes[index : index + BEHIND + 1]) for index in range(len(sizes)))


def _least(counts: Counts, device: torch.device) -> Counts:
    """The smallest that any worker has, of each kind."""
    least = torch.tensor([counts.get(kind, 0) for kind in KINDS], device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return {kind: count for kind, count in zip(KINDS, least.tolist(), strict=True) if count}


def _lowest(value: int, device: torch.device) -> int:
    """Of all workers."""
    lowest = torch.tensor(value, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest)


def _spread(places: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> set[int]:
    """So many blocks of each kind, evenly over its places: a copy then has the time until the next one to
    itself."""
    chosen = set()
    for kind, count in counts.items():
        chosen |= {places[kind][step * len(places[kind]) // count] for step in range(count)}
    return chosen


def _keep_last(blocks: Sequence[nn.Module], kept: Mapping[str, int]) -> None:
    """Let the last blocks of each kind keep theirs, so many as `kept` says; their backward pass is first."""
    left = Counter(kept)
    for block in reversed(blocks):
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


def measure_costs(model: nn.Module, held: Callable[[], int]) -> Counts:
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
