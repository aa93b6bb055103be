"""A GPU's streams as vector clocks: on a CPU, which does everything at once, they tell what would race."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = tuple[str, int]
"""A stream's name, and which of its pieces of work."""
Clock = dict[str, int]
"""How many pieces of work of each stream are done."""

# Of a tensor: they read nothing.
_VIEWS = {"alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t"}
_VIEWS |= {"transpose", "unbind", "unsqueeze", "view"}


class Stream:
    """What comes next on it happens after what its clock says."""

    def __init__(self, name: str) -> None:
        self.name, self._clock = name, {name: 0}

    def work(self) -> Work:
        self._clock[self.name] += 1
        return self.name, self._clock[self.name]

    def is_after(self, work: Work) -> bool:
        return self._clock.get(work[0], 0) >= work[1]

    def record_event(self) -> Clock:
        return dict(self._clock)

    def wait_event(self, event: Clock) -> None:
        for name, count in event.items():
            self._clock[name] = max(self._clock.get(name, 0), count)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


def use_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test: torch.cuda.current_stream() is a clock, which torch.cuda.stream() exchanges."""
    current = [Stream("compute")]

    @contextlib.contextmanager
    def stream(other: Stream | None) -> Iterator[None]:
        current.append(other or current[-1])
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)


class Races(TorchDispatchMode):
    """Notes reads and writes of some memory whose order the streams leave open."""

    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        self.reads = 0
        self.writers: set[str] = set()
        """Names of streams."""
        self._written: dict[int, Work] = {}
        self._read: dict[int, list[Work]] = {tensor.untyped_storage().data_ptr(): [] for tensor in watched}
        self._writes = False

    def writing(
        self, write: Callable[[Any], None], place: Callable[[Any], torch.Tensor]
    ) -> Callable[[Any], None]:
        """`write`, which fills `place(argument)` anew."""

        def noted(argument: Any) -> None:
            address = place(argument).untyped_storage().data_ptr()
            stream = torch.cuda.current_stream()
            if not all(stream.is_after(read) for read in self._read[address]):
                self.found.append("a write before a read is done")
            self._writes = True
            write(argument)
            self._writes = False
            self._read[address].clear()
            self._written[address] = stream.work()
            self.writers.add(stream.name)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._writes and func.name().removeprefix("aten::").partition(".")[0] not in _VIEWS:
            for leaf in tree_leaves((args, kwargs)):
                address = leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else None
                if address in self._read:
                    self._note_read(address, func.name())
        return func(*args, **(kwargs or {}))

    def _note_read(self, address: int, name: str) -> None:
        stream = torch.cuda.current_stream()
        if address not in self._written or not stream.is_after(self._written[address]):
            self.found.append(f"{name} before what it reads has arrived")
        self._read[address].append(stream.work())
        self.reads += 1
