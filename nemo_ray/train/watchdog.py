"""A rank that makes no progress ends itself and leaves its stack, so that the workers can be started again.

The clock is faulthandler's: a C thread that needs no lock of the interpreter, so it strikes also where a C
call never returns. Owns the file in which each rank says where it is (RunDir.rank_file); lost.py reads it.
"""

import contextlib
import faulthandler
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

WAIT_S = 1800.0
"""How much longer than its own work a rank may wait for data, or for ranks that wait for data: what a reader
allows a shard to take (PackReader's timeout_s)."""
SLOW_FACTOR = 12
"""How much longer than a step the phases may take whose length is the model's size and the disk's pace."""
_QUICK = ("training", "evaluating")
_SLOW = ("loading", "compiling", "self-test", "completing", "saving", "exporting")
_HEADER_BYTES = 512


def collective_timeout_s(timeout_s: float) -> float:
    """What a collective may wait, so that the rank at fault strikes before those that wait for it give up."""
    longest_s = max(timeout_s + WAIT_S, timeout_s * SLOW_FACTOR)
    return longest_s + 600.0 if timeout_s else WAIT_S  # torch's own default


@dataclass(frozen=True)
class RankState:
    """Where a rank is, as it said itself; `step` counts the steps done."""

    rank: int
    host: str
    pid: int
    phase: str = "starting"
    step: int = 0
    since: float = 0.0  # time.time() of the last sign of progress
    limit_s: float = 0.0  # 0: no limit in this phase


class Watchdog:
    """Context manager around a rank's work; its methods belong to one thread. Never armed at its end."""

    def __init__(self, file: Path, rank: int, timeout_s: float) -> None:
        """timeout_s: what a step, or a batch of an evaluation, may take at most; 0 for no limit."""
        self._path, self._timeout_s = file, timeout_s
        self._rank, self._host, self._pid = rank, socket.gethostname(), os.getpid()
        self._phase, self.step = "starting", 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(OSError):  # a disk that takes no notes of a hang is no reason to end a run
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "wb", buffering=0)
            self._file.seek(_HEADER_BYTES)  # where faulthandler goes on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None

    def enter(self, phase: str, step: int = 0) -> None:
        """A phase of the run begins, by its name in progress.json. One without a name there has no limit."""
        self._phase, self.step = phase, step
        slow = SLOW_FACTOR if phase in _SLOW else 0
        self._arm(self._timeout_s * (1 if phase in _QUICK else slow))

    def work(self) -> None:
        """A step's or a batch's own work begins, which waits for nobody who may rightly be late."""
        self._arm(self._timeout_s)

    def wait(self) -> None:
        """A wait begins: for data, or for ranks that may wait for data. Whom they wait for strikes first."""
        self._arm(self._timeout_s + WAIT_S if self._timeout_s else 0)

    def _arm(self, limit_s: float) -> None:
        if self._file is None:
            return
        state = RankState(
            self._rank, self._host, self._pid, self._phase, self.step, time.time(), round(limit_s, 3)
        )
        with contextlib.suppress(OSError):
            header = json.dumps(asdict(state)).encode()
            os.pwrite(self._file.fileno(), header.ljust(_HEADER_BYTES - 1) + b"\n", 0)
        if limit_s:
            faulthandler.dump_traceback_later(limit_s, exit=True, file=self._file)
        else:
            faulthandler.cancel_dump_traceback_later()


def read_rank(file: Path) -> tuple[RankState, str] | None:
    """What a rank said last, and its stacks where it ended itself; None where it has not said anything."""
    try:
        content = file.read_bytes()
        return RankState(**json.loads(content[:_HEADER_BYTES])), content[_HEADER_BYTES:].decode(
            errors="replace"
        )
    except (FileNotFoundError, ValueError, TypeError):
        return None
