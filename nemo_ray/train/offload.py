"""Activations in host memory, of blocks that neither keep theirs on the GPU nor make them again.

What such a block saves for its backward pass goes to pinned memory while the blocks after it compute, and is
brought back while the backward pass is at those: copy engines do it, no multiprocessor. Only where a block's
turn comes before its copies are done does anybody wait. Addresses on the host stay from pass to pass, so a
step can be recorded as a CUDA graph.
"""

import contextlib
import itertools
import logging
import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from nemo_ray.host_memory import available_bytes
from nemo_ray.train.reached import when_reached

_log = logging.getLogger(__name__)

LEAST_BYTES = 2**24  # smaller tensors stay: they free little
AHEAD = 12  # blocks whose backward passes hide the way back
BEHIND = 16  # blocks whose forward passes hide the way out

_PROBE_BYTES = 2**28
_PROBES = 8  # workers of a host, which share its memory, do not begin at the same moment
_HIDDEN = 0.55  # of a forward pass: with 0.7 (Nano, one H200) blocks waited for more than they saved


@dataclass
class _Saved:
    """The memory of tensors that a block saved; some of them may be views of the same."""

    of_pass: int
    host: torch.Tensor
    device: torch.Tensor | None
    """Bytes on the GPU: on their way to the host, or back from there."""
    uses: int = 0
    """In the backward pass, that are still to come."""
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _View:
    """A tensor that was saved, as a view of its memory."""

    memory: _Saved
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostActivations:
    """Moves what blocks of a model save, one pass at a time; `move` says which blocks'.

    Weights must stay where they are: not for a model that FSDP2 shards.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self.device = model, device
        self.moved: frozenset[int] = frozenset()
        self._weights: set[int] = set()
        """Addresses: a weight that is saved stays where it is."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._saved: dict[int, list[_Saved]] = {}
        self._hosts: dict[tuple[int, int], torch.Tensor] = {}
        self._refused = False
        """Whether the system gave no more of it: what comes then stays on the GPU."""
        self._leaving: deque[tuple[int, torch.cuda.Event | None, list[_Saved]]] = deque()
        """Blocks that are done, whose tensors are on their way out."""
        self._hooks: saved_tensors_hooks | None = None
        self._passes = 0
        model.model.embeddings.register_forward_pre_hook(lambda *_: self._begin())
        for index, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(lambda *_, index=index: self._before_forward(index))
            block.register_forward_hook(
                lambda *args, index=index: self._after_forward(index, args[-1]), always_call=True
            )

    def move(self, blocks: Collection[int]) -> None:
        """From the next pass on, move what these blocks save, which must not be made again."""
        self._let_go()
        self._saved.clear()
        self._refused = False
        self.moved = frozenset(blocks)
        weights = itertools.chain(self._model.parameters(), self._model.buffers())
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._hosts = {key: host for key, host in self._hosts.items() if key[0] in self.moved}

    @property
    def host_bytes(self) -> int:
        """Of pinned memory."""
        return sum(host.numel() for host in self._hosts.values())

    # -- forward ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._passes += 1
        self._let_go()

    def _before_forward(self, index: int) -> None:
        if not torch.is_grad_enabled():
            return
        self._let_go(index - BEHIND)
        if index in self.moved:
            self._saved[index] = []
            self._hooks = saved_tensors_hooks(partial(self._pack, index), self._unpack)
            self._hooks.__enter__()

    def _after_forward(self, index: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
            if self._saved[index]:  # else the stream may have no part yet in the graph that is recorded
                event = self._stream.record_event() if self._stream is not None else None
                self._leaving.append((index, event, self._saved[index]))
        if hidden is None or not self.moved:  # None where the block raised
            return hidden
        return when_reached(hidden, partial(self._before_backward, index))

    def _pack(self, index: int, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST_BYTES or storage.data_ptr() in self._weights:
            return tensor.detach()  # an output of the node that saves it would hold that node
        # None of these lets go of its memory in this block's pass, so an address stands for one of them.
        found = next((one for one in self._saved[index] if _address(one) == storage.data_ptr()), None)
        if found is None:
            found = self._send(index, storage)
        if found is None:
            return tensor.detach()
        found.uses += 1
        return _View(found, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _send(self, index: int, storage: torch.UntypedStorage) -> _Saved | None:
        saved, key = self._saved[index], (index, len(self._saved[index]))
        memory = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        host = self._hosts.get(key)
        if host is None or host.numel() != memory.numel():
            host = self._take(key, memory.numel())
        if host is None:
            return None
        self._copy(host, memory)
        saved.append(_Saved(self._passes, host, memory))
        return saved[-1]

    def _take(self, key: tuple[int, int], num_bytes: int) -> torch.Tensor | None:
        self._hosts.pop(key, None)
        try:
            if not self._refused:
                self._hosts[key] = pinned(num_bytes, self.device)
        except RuntimeError as error:
            self._refused = True
            _log.warning("%s: activations stay on the GPU", error)
        return self._hosts.get(key)

    def _let_go(self, last: int | None = None) -> None:
        """Give back the GPU's memory of the blocks up to `last`, all where it is None, when it has been
        copied."""
        while self._leaving and (last is None or self._leaving[0][0] <= last):
            _, event, saved = self._leaving.popleft()
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
            for one in saved:
                one.device = None

    # -- backward ---------------------------------------------------------------------------------

    def _before_backward(self, index: int) -> None:
        self._let_go()
        for coming in range(index, max(index - AHEAD, 0) - 1, -1):
            for saved in reversed(self._saved.get(coming, ())):
                self._fetch(saved)

    def _fetch(self, saved: _Saved) -> None:
        if saved.device is None and saved.uses:
            saved.device = torch.empty_like(saved.host, device=self.device)
            self._copy(saved.device, saved.host)
            saved.arrived = self._stream.record_event() if self._stream is not None else None

    def _unpack(self, view: Any) -> torch.Tensor:
        if isinstance(view, torch.Tensor):
            return view
        saved = view.memory
        if saved.of_pass != self._passes:
            raise RuntimeError("another forward pass has taken the host memory of this one's activations")
        self._fetch(saved)
        assert saved.device is not None
        if saved.arrived is not None:
            torch.cuda.current_stream().wait_event(saved.arrived)
        tensor = saved.device.view(view.dtype).as_strided(view.size, view.stride, view.offset)
        saved.uses -= 1
        if not saved.uses:
            saved.device = saved.arrived = None
        return tensor

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """After what the current stream has done so far, beside what it does next."""
        if self._stream is None:
            to.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)


def _address(saved: _Saved) -> int:
    assert saved.device is not None  # its block's forward pass is not over
    return saved.device.data_ptr()


def movable_bytes(device: torch.device, forward: Callable[[], torch.Tensor], wanted: int) -> int:
    """How much of `wanted` bytes can be copied to the host while a forward pass computes, and lie there: of
    what memory it has left half, shared with the other workers of this host.

    Args:
        forward: of a batch of the size that will train; called before, so that nothing is made at first now.
    """
    if _largest_pinned(_PROBE_BYTES, device) < _PROBE_BYTES:
        for _ in range(2):  # passes as on the other workers, which may need this one's part in them
            forward()
        return 0
    host = pinned(_PROBE_BYTES, device)
    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)

    def copy() -> object:
        return host.copy_(source, non_blocking=True)

    def copy_some() -> None:
        for _ in range(_PROBES):
            copy()

    copy()
    copy_s = _seconds(copy_some) / _PROBES
    began_s = time.perf_counter()
    forward()
    torch.cuda.synchronize()
    # The GPU waits for the host's launches there, and not where a graph is replayed: copies let the host get
    # ahead.
    for _ in range(int(2 * (time.perf_counter() - began_s) / copy_s)):
        copy()
    forward_s = _seconds(forward)
    held = (available_bytes() or 0) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _largest_pinned(min(wanted, held, int(_HIDDEN * forward_s / copy_s * _PROBE_BYTES)), device)


def _largest_pinned(num_bytes: int, device: torch.device) -> int:
    """So many bytes, or half of them, and so on, as the system does give: some pin less than they have."""
    while num_bytes >= LEAST_BYTES:
        try:
            pinned(num_bytes, device)
            return num_bytes
        except RuntimeError as error:
            _log.warning("%s", error)
            num_bytes //= 2
    return 0


def _seconds(work: Callable[[], object]) -> float:
    """Of GPU time, after what the current stream has to do already."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def pinned(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory that the GPU reads and writes by itself, exactly so many: torch's own allocator
    rounds up to powers of two. Raises: RuntimeError where the system does not give it."""
    refusal = f"no {num_bytes:,} bytes of pinned host memory for activations"
    try:
        pages = mmap.mmap(-1, num_bytes)  # of its own
    except OSError as error:
        raise RuntimeError(f"{refusal}: {error}") from error
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        try:
            torch.cuda.check_error(cudart.cudaHostRegister(address, num_bytes, 0))
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # else the launch of the next kernel finds that error
                torch.zeros((), device=device)
            raise RuntimeError(f"{refusal}: {error}") from error
        weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return memory
