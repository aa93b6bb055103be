"""Copies in host memory of what a checkpoint saves, made beside training.

A GPU's copy engine makes them while the next step computes its gradients: only the optimizer, which changes
what is copied, waits for them.
"""

import time
from typing import Any

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from nemo_ray.train.optim import local_part

_LIMIT_S = 300.0
_POLL_S = 0.005


class HostCopies(BlockingAsyncStager):
    """For one checkpoint at a time. Of a GPU's tensors, in pinned memory that serves every checkpoint; the
    first one takes that memory, and waits."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__(cache_staged_state_dict=on_gpu)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._made: torch.cuda.Event | None = None
        self._number = 0
        self._arrived = torch.zeros((), dtype=torch.int64)
        """Comes after the copies of that number: another thread may ask CUDA nothing while this one records a
        graph, but it may read memory."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Begin to copy; what is returned holds the values when `wait` has returned."""
        if self._stream is None or self.state_dict_cache is None:
            copies = super().stage(state_dict)
            if self._stream is not None:
                self._arrived = self._arrived.pin_memory()
                for name, copy in copies.items():  # torch pins no scalars, and a copy there waits
                    self.state_dict_cache[name] = copy.pin_memory() if copy.dim() == 0 else copy
            return copies
        self._number += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            number = torch.full((), self._number, device=self._stream.device)
            for name, tensor in state_dict.items():
                local_part(self.state_dict_cache[name]).copy_(local_part(tensor), non_blocking=True)
            self._arrived.copy_(number, non_blocking=True)
        self._made = self._stream.record_event()
        return dict(self.state_dict_cache)

    def hold_changes(self) -> None:
        """What the current stream does from here on comes after the copies."""
        if self._made is not None:
            torch.cuda.current_stream().wait_event(self._made)
            self._made = None

    def wait(self) -> None:
        """Return when the copies are there; in any thread. Raises: TimeoutError where they do not come."""
        end_s = time.monotonic() + _LIMIT_S
        while int(self._arrived) != self._number:
            if time.monotonic() > end_s:
                raise TimeoutError(f"the GPU did not copy what is saved within {_LIMIT_S:.0f} s")
            time.sleep(_POLL_S)
