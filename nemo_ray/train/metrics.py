"""The figures of a run: the running hash of its samples, peak memory, and when something is due."""

import hashlib
import math
import resource
from collections.abc import Sequence

import torch


def extend_hash(previous: str, drawn: Sequence[tuple[str, int]]) -> str:
    """Hash of all samples so far: of the hash before, and a step's packs in global order.

    A pack is named by its window's key, which is a digest of the rows and of all that shapes them, and its
    number in the shard.
    """
    return hashlib.blake2b(f"{previous}{drawn}".encode(), digest_size=16).hexdigest()


class FiguresOnTheWay:
    """Figures of a step, each a tensor of one value, on their way from the device, which goes on."""

    def __init__(self, *figures: torch.Tensor) -> None:
        self._values = torch.stack([figure.float() for figure in figures])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def are_here(self) -> bool:
        """Whether nothing has to be waited for, and no step runs meanwhile."""
        return self._arrived is None

    def wait(self) -> list[float]:
        """Their values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process held: reserved on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def passed_multiple(before: float, after: float, times_per_unit: float | None) -> bool:
    """Whether a multiple of 1 / times_per_unit lies in (before, after]."""
    if not times_per_unit:
        return False
    slack = 1e-9
    return math.floor(after * times_per_unit + slack) > math.floor(before * times_per_unit + slack)
