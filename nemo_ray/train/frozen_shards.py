"""The frozen base of an adapter run, spread over workers: each holds some rows of every weight.

FSDP2 moves such a weight in and out of a buffer around each collective, by kernels that take a GPU's time and
memory bandwidth from the step. A weight that never changes needs none of that. Here a worker's rows lie ready
to be sent, a block's weights are views into one of two buffers of its kind, and rows arrive where they are
used. Within a host a worker takes them out of the others' memory by itself: the GPUs' copy engines do it, no
multiprocessor, and since nobody writes there any more, nobody waits for anybody. Over hosts it is one
all-gather a weight. All addresses stay, so a step can be recorded as a CUDA graph.

What trains, an adapter's factors, each worker holds whole, as where the base is not spread (parallelize.py).
"""

import os
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_ray.model.sharding import RowShard
from nemo_ray.train.reached import first_reached, when_reached

# torch 2.13's name for it; there the older one warns.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

AHEAD = 2  # blocks that are fetched while one computes: experts' weights take longer than a Mamba block
BUFFERS = 2  # of each kind of block
ALIGNED = 256  # bytes


@dataclass
class _Weight:
    """One weight of a block."""

    part: torch.Tensor
    """This worker's rows, as many as every worker's; the last ones may be padding."""
    gathered: torch.Tensor
    """(workers, rows...) in the buffer; the parameter is a view of it."""
    sources: list[torch.Tensor]
    """Where a worker can read each worker's part; empty where they are sent."""


@dataclass
class _Buffer:
    """Memory for one block's weights at a time."""

    memory: torch.Tensor
    block: int | None = None
    arrived: tuple[torch.cuda.Event, ...] = ()
    """After the last of its weights."""


class FrozenShards:
    """Spreads the frozen weights of a model's blocks over the workers of `group`, by rows.

    In this order: made on meta; the model filled, which asks `model.row_shards` for this worker's rows;
    `hold`. After that the model is called as ever.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.blocks: list[nn.Module] = list(model.model.layers)
        self.reached_first = first_reached(model)
        model.row_shards = {}
        for index, block in enumerate(self.blocks):
            for name, parameter in _spread_of(block):
                shape = parameter.shape
                rows = -(-shape[0] // self.size)
                first = min(self.rank * rows, shape[0])
                count = min(rows, shape[0] - first)
                model.row_shards[_path(index, name)] = RowShard(shape, first, count)
                parameter.data = parameter.data.new_empty(rows, *shape[1:])
        self._weights: list[list[_Weight]] = []
        self._buffer_of: list[_Buffer] = []
        self._in_backward: int | None = None
        # Rows of others, and this worker's own: both ways at once.
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self.untracked_bytes = 0
        """Of parts that others read, which torch's allocator does not count."""
        model.model.embeddings.register_forward_pre_hook(lambda *_: self._begin())
        for index, block in enumerate(self.blocks):
            block.make_whole = partial(self._before_forward, index)
            block.register_forward_pre_hook(lambda *_, index=index: self._before_forward(index))
            block.register_forward_hook(lambda *args, index=index: self._after_forward(index, args[-1]))

    def hold(self, model: nn.Module, device: torch.device) -> None:
        """Take over the rows that the model was filled with, and make its parameters whole in shape."""
        if device.type == "cuda":
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        readable = self._can_read_each_other(device)
        kinds = [block.block_type for block in self.blocks]
        plans = [self._plan(model, index) for index in range(len(self.blocks))]
        buffers: dict[str, list[_Buffer]] = {}
        for kind in dict.fromkeys(kinds):
            size = max(total for (_, total), its in zip(plans, kinds, strict=True) if its == kind)
            buffers[kind] = [
                _Buffer(torch.empty(size, dtype=torch.uint8, device=device))
                for _ in range(min(BUFFERS, kinds.count(kind)))
            ]
        for index, (weights, _) in enumerate(plans):
            of_kind = buffers[kinds[index]]
            buffer = of_kind[kinds[:index].count(kinds[index]) % len(of_kind)]
            self._buffer_of.append(buffer)
            self._weights.append(self._place(weights, buffer.memory, readable))
        del model.row_shards
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier(group=self.group)  # from here on everybody may read

    # -- where the weights lie -------------------------------------------------------------------

    def _plan(self, model: nn.Module, index: int) -> tuple[list[tuple[nn.Parameter, torch.Size, int]], int]:
        """(parameter, whole shape, start) of each weight of a block, and the bytes of its buffer."""
        found, end = [], 0
        for name, parameter in _spread_of(self.blocks[index]):
            found.append((parameter, model.row_shards[_path(index, name)].shape, end))
            num_bytes = self.size * parameter.numel() * parameter.itemsize
            end += -(-num_bytes // ALIGNED) * ALIGNED
        return found, end

    def _place(
        self, weights: list[tuple[nn.Parameter, torch.Size, int]], buffer: torch.Tensor, readable: bool
    ) -> list[_Weight]:
        sizes = [-(-p.numel() * p.itemsize // ALIGNED) * ALIGNED for p, _, _ in weights]
        parts, peers = self._memory_for_parts(sum(sizes), buffer.device, readable)
        placed, end = [], 0
        for (parameter, shape, start), size in zip(weights, sizes, strict=True):
            rows = parameter.data

            def view(memory: torch.Tensor, at: int = end, like: torch.Tensor = rows) -> torch.Tensor:
                return memory[at : at + like.numel() * like.itemsize].view(like.dtype).view(like.shape)

            part = view(parts)
            part.copy_(rows)
            num_bytes = self.size * rows.numel() * rows.itemsize
            gathered = buffer[start : start + num_bytes].view(rows.dtype).view(self.size, *rows.shape)
            parameter.data = gathered.flatten(0, 1)[: shape[0]]
            placed.append(_Weight(part, gathered, [view(peer) for peer in peers]))
            end += size
        return placed

    def _memory_for_parts(
        self, num_bytes: int, device: torch.device, readable: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Memory for a block's parts, and all workers' as this one can read them."""
        if not readable:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device), []
        import torch.distributed._symmetric_memory as symmetric_memory

        self.untracked_bytes += num_bytes
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it would be of no use here
        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        shared = symmetric_memory.rendezvous(own, self.group)
        peers = [shared.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self.size)]
        peers[self.rank] = own
        return own, peers

    def _can_read_each_other(self, device: torch.device) -> bool:
        """Whether all workers of the group are on GPUs of one host that reach each other's memory."""
        if device.type != "cuda":
            return False
        own = torch.cuda.current_device() if device.index is None else device.index
        places: list[Any] = [None] * self.size
        dist.all_gather_object(places, (socket.gethostname(), own), group=self.group)
        others = [index for index in {index for _, index in places} if index != own]
        can = len({host for host, _ in places}) == 1 and len(others) == self.size - 1
        return self._all(can and all(torch.cuda.can_device_access_peer(own, index) for index in others))

    def _all(self, holds: bool) -> bool:
        """Whether it holds on all workers."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, holds, group=self.group)
        return all(found)

    # -- when they are fetched -------------------------------------------------------------------

    def _begin(self) -> None:
        """A pass over all blocks begins: with nothing, so that every pass does the same."""
        self._in_backward = None
        for buffer in self._buffer_of:
            buffer.block = None

    def _before_forward(self, index: int) -> None:
        if self._in_backward == index and self._buffer_of[index].block == index:
            return  # the block's activations are made again, in its backward pass
        self._in_backward = None
        self._use(index, range(index + 1, min(index + 1 + AHEAD, len(self.blocks))))

    def _after_forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return when_reached(hidden, partial(self._before_backward, index))

    def _before_backward(self, index: int) -> None:
        self._in_backward = index
        self._use(index, range(index - 1, max(index - 1 - AHEAD, self.reached_first - 1), -1))

    def _use(self, index: int, coming: range) -> None:
        """Have block `index` whole for what the current stream does next, and fetch those that come."""
        self._fetch(index)
        if not self._streams:
            return
        for event in self._buffer_of[index].arrived:
            torch.cuda.current_stream().wait_event(event)
        needed = {index}
        for following in coming:
            if self._buffer_of[following].block in needed:
                break
            self._fetch(following)
            needed.add(following)

    def _fetch(self, index: int) -> None:
        buffer = self._buffer_of[index]
        if buffer.block == index:
            return
        buffer.block = index
        for stream in self._streams:  # all that used this buffer before is in the current stream already
            stream.wait_stream(torch.cuda.current_stream())
        for weight in self._weights[index]:
            self._gather(weight)
        buffer.arrived = tuple(stream.record_event() for stream in self._streams)

    def _gather(self, weight: _Weight) -> None:
        if not weight.sources:
            flat = (tensor.view(-1).view(torch.uint8) for tensor in (weight.gathered, weight.part))
            with torch.cuda.stream(self._streams[0] if self._streams else None):
                _all_gather(*flat, group=self.group)
            return
        for step in range(self.size):  # each begins with its own, so that they do not crowd at one
            rank = (self.rank + step) % self.size
            with torch.cuda.stream(self._streams[0 if step else 1]):
                weight.gathered[rank].copy_(weight.sources[rank], non_blocking=True)


def _path(index: int, name: str) -> str:
    """A parameter's name in the model."""
    return f"model.layers.{index}.{name}"


def _spread_of(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of a block that are spread: all that are frozen, but vectors."""
    return [
        (name, parameter)
        for name, parameter in block.named_parameters()
        if not parameter.requires_grad and parameter.dim() > 1
    ]
