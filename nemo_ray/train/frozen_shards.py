"""The frozen base of an adapter run, spread over workers: each holds a part of the weights.

FSDP2 moves such a weight in and out of a buffer around each collective, by kernels that take a GPU's time and
memory bandwidth from the step. A weight that never changes needs none of that. Here a worker's part lies
ready to be sent, a block's weights are views into one of two buffers of its kind, and rows arrive where they
are used. Within a host a worker takes them out of the others' memory by itself: the GPUs' copy engines do it,
no multiprocessor, and since nobody writes there any more, nobody waits for anybody. Over hosts it is one
all-gather a weight. All addresses stay, so a step can be recorded as a CUDA graph.

A part is some rows of every weight. A worker's own rows are then copied beside the others', by a kernel: half
of the base for two workers. So two of a host hold every other block whole instead, and compute where it lies.

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

BUFFERS = 2  # of each kind of block
ALIGNED = 256  # bytes


@dataclass
class _Weight:
    """One weight of a block that is fetched."""

    gathered: torch.Tensor
    """(parts, rows...) in the buffer; the parameter is a view of it."""
    sources: list[torch.Tensor]
    """Where this worker can read each part; its own alone, where parts are sent. All are as many rows, of
    which the last ones may be padding."""


@dataclass
class _Buffer:
    """Memory for one block's weights at a time."""

    memory: torch.Tensor
    block: int | None = None
    arrived: torch.cuda.Event | None = None
    """After the last of its weights."""


class FrozenShards:
    """Spreads the frozen weights of a model's blocks over the workers of `group`.

    In this order: made on meta; the model filled, which asks `model.row_shards` for this worker's rows;
    `hold`. After that the model is called as ever.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.device = device
        self.blocks: list[nn.Module] = list(model.model.layers)
        self.reached_first = first_reached(model)
        self._readable = self._can_read_each_other()
        self._units = self._divide()
        self._holder = {
            index: rank for unit in self._units if len(unit) > 1 for rank, index in enumerate(unit)
        }
        """Blocks that one worker holds whole, and which one."""
        model.row_shards = {}
        for index in range(len(self.blocks)):
            self._take_share(model, index)
        self._weights: list[list[_Weight]] = [[] for _ in self.blocks]
        self._buffer_of: list[_Buffer | None] = [None] * len(self.blocks)
        self._in_backward: int | None = None
        self._stream: torch.cuda.Stream | None = None
        self.untracked_bytes = 0
        """Of parts that others read, which torch's allocator does not count."""
        model.model.embeddings.register_forward_pre_hook(lambda *_: self._begin())
        for index, block in enumerate(self.blocks):
            block.make_whole = partial(self._before_forward, index)
            block.register_forward_pre_hook(lambda *_, index=index: self._before_forward(index))
            block.register_forward_hook(lambda *args, index=index: self._after_forward(index, args[-1]))

    def hold(self, model: nn.Module) -> None:
        """Take over the rows that the model was filled with, and make its parameters whole in shape."""
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
        self._make_buffers(model)
        for unit in self._units:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what the model was filled into: parts lie outside torch's cache
            self._place(model, unit)
        del model.row_shards
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        dist.barrier(group=self.group)  # from here on everybody may read

    # -- where the weights lie -------------------------------------------------------------------

    def _divide(self) -> list[tuple[int, ...]]:
        """Blocks that are placed together: one of which every worker holds some rows, or one for each worker,
        which holds it whole."""
        units: list[tuple[int, ...]] = []
        for kind in dict.fromkeys(block.block_type for block in self.blocks):
            of_kind = [index for index, block in enumerate(self.blocks) if block.block_type == kind]
            alike = len({_layout(self.blocks[index]) for index in of_kind}) == 1
            turns = 2 if self.size == 2 and self._readable and alike else 1
            # One that is left over is the first: nothing hides its fetch, and half of it is there sooner.
            left = len(of_kind) % turns
            units += [(index,) for index in of_kind[:left]]
            units += [tuple(of_kind[at : at + turns]) for at in range(left, len(of_kind), turns)]
        return units

    def _parts(self, index: int) -> int:
        """In how many parts a block's weights lie on the workers."""
        return 1 if index in self._holder else self.size

    def _is_fetched(self, index: int) -> bool:
        return self._holder.get(index) != self.rank

    def _take_share(self, model: nn.Module, index: int) -> None:
        """Leave this worker's rows of a block's weights."""
        number = 0 if index in self._holder else self.rank
        for name, parameter in _spread_of(self.blocks[index]):
            shape = parameter.shape
            rows = -(-shape[0] // self._parts(index))
            if self._holder.get(index, self.rank) != self.rank:
                rows = 0
            first = min(number * rows, shape[0])
            model.row_shards[_path(index, name)] = RowShard(shape, first, min(rows, shape[0] - first))
            parameter.data = parameter.data.new_empty(rows, *shape[1:])

    def _plan(self, model: nn.Module, index: int) -> list[tuple[nn.Parameter, torch.Size, int]]:
        """(parameter, whole shape, bytes of a part) of each weight of a block."""
        found = []
        for name, parameter in _spread_of(self.blocks[index]):
            shape = model.row_shards[_path(index, name)].shape
            rows = -(-shape[0] // self._parts(index))
            found.append((parameter, shape, rows * shape[1:].numel() * parameter.itemsize))
        return found

    def _make_buffers(self, model: nn.Module) -> None:
        sizes: dict[str, dict[int, int]] = {}
        for index, block in enumerate(self.blocks):
            if self._is_fetched(index):
                size = sum(_aligned(self._parts(index) * part) for *_, part in self._plan(model, index))
                sizes.setdefault(block.block_type, {})[index] = size
        for of_kind in sizes.values():
            buffers = [
                _Buffer(torch.empty(max(of_kind.values()), dtype=torch.uint8, device=self.device))
                for _ in range(min(BUFFERS, len(of_kind)))
            ]
            for number, index in enumerate(of_kind):
                self._buffer_of[index] = buffers[number % len(buffers)]

    def _place(self, model: nn.Module, unit: tuple[int, ...]) -> None:
        """Put this worker's part of these blocks where others can read it, and their parameters in place."""
        plans = {index: self._plan(model, index) for index in unit}
        own, peers = self._memory_for_parts(sum(_aligned(num_bytes) for *_, num_bytes in plans[unit[0]]))
        for index, plan in plans.items():
            buffer, start, end = self._buffer_of[index], 0, 0
            for parameter, shape, num_bytes in plan:
                dtype, of_part = parameter.dtype, (-1, *shape[1:])
                parts = [
                    memory[start : start + num_bytes].view(dtype).view(of_part) for memory in (own, *peers)
                ]
                start += _aligned(num_bytes)
                part, *sources = parts
                if parameter.numel():
                    part.copy_(parameter.data)
                if buffer is None:
                    parameter.data = part
                    continue
                if index in self._holder:
                    sources = [sources[self._holder[index]]]
                size = self._parts(index) * num_bytes
                gathered = buffer.memory[end : end + size].view(dtype).view(self._parts(index), *of_part)
                end += _aligned(size)
                parameter.data = gathered.flatten(0, 1)[: shape[0]]
                self._weights[index].append(_Weight(gathered, sources or [part]))

    def _memory_for_parts(self, num_bytes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Memory for this worker's parts, and all workers' as this one can read them."""
        if not self._readable:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device), []
        import torch.distributed._symmetric_memory as symmetric_memory

        self.untracked_bytes += num_bytes
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it would be of no use here
        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self.device)
        shared = symmetric_memory.rendezvous(own, self.group)
        peers = [shared.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self.size)]
        peers[self.rank] = own
        return own, peers

    def _can_read_each_other(self) -> bool:
        """Whether all workers of the group are on GPUs of one host that reach each other's memory."""
        if self.device.type != "cuda":
            return False
        own = torch.cuda.current_device() if self.device.index is None else self.device.index
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
            if buffer is not None:
                buffer.block = None

    def _before_forward(self, index: int) -> None:
        buffer = self._buffer_of[index]
        if self._in_backward == index and (buffer is None or buffer.block == index):
            return  # the block's activations are made again, in its backward pass
        self._in_backward = None
        self._use(index, range(index + 1, len(self.blocks)))

    def _after_forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return when_reached(hidden, partial(self._before_backward, index))

    def _before_backward(self, index: int) -> None:
        self._in_backward = index
        self._use(index, range(index - 1, self.reached_first - 1, -1))

    def _use(self, index: int, coming: range) -> None:
        """Have block `index` whole for what the current stream does next, and fetch what comes after it, as
        far as there are buffers."""
        self._fetch(index)
        if self._stream is None:
            return
        buffer = self._buffer_of[index]
        if buffer is not None and buffer.arrived is not None:
            torch.cuda.current_stream().wait_event(buffer.arrived)
        needed = {index}
        for following in coming:
            buffer = self._buffer_of[following]
            if buffer is not None and buffer.block in needed:
                break
            self._fetch(following)
            needed.add(following)

    def _fetch(self, index: int) -> None:
        buffer = self._buffer_of[index]
        if buffer is None or buffer.block == index:
            return
        buffer.block = index
        if self._stream is not None:  # all that used this buffer before is in the current stream already
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for weight in self._weights[index]:
                self._gather(weight)
        if self._stream is not None:
            buffer.arrived = self._stream.record_event()

    def _gather(self, weight: _Weight) -> None:
        count = len(weight.gathered)
        if len(weight.sources) < count:
            flat = (tensor.view(-1).view(torch.uint8) for tensor in (weight.gathered, *weight.sources))
            _all_gather(*flat, group=self.group)
            return
        for step in range(count):  # each begins with its own, so that they do not crowd at one
            number = (self.rank + step) % count
            weight.gathered[number].copy_(weight.sources[number], non_blocking=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED


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


def _layout(block: nn.Module) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((parameter.shape, parameter.dtype) for _, parameter in _spread_of(block))
