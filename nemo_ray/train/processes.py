"""What a process of this machine is doing: its state, and its stack from outside. Imports no Ray."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

STACK_WITHIN_S = 15.0
_STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "in a call of the kernel that does not return, most often to a disk",
    "R": "computing",
    "S": "sleeping",
}


@dataclass(frozen=True)
class Look:
    """A process as it was found; `state` is None where there is none any more."""

    state: str | None
    stack: str = ""


def look(pid: int, silent: bool) -> Look:
    """The state of the process `pid`. A silent one, which Ray gave up, is looked at closely, and killed.

    Ray 2.60 would wait 15 s for the farewell of a process that cannot say any.
    """
    state = _state(pid)
    if state is None or not silent:
        return Look(state)
    found = Look(state, _stack(pid))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return found


def _state(pid: int) -> str | None:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter in "ZX" else _STATES.get(letter, f"in state {letter}")


def _stack(pid: int) -> str:
    """By py-spy, which comes with Ray and asks nothing of the process; where it may not, what /proc says."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    why = "it is not installed"
    if command is not None:
        try:
            done = subprocess.run(
                [command, "dump", "--nonblocking", "--pid", str(pid)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=STACK_WITHIN_S,
            )
            if done.returncode == 0:
                return done.stdout
            why = done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
    facts = []
    for name in ("status", "wchan", "stack"):
        with contextlib.suppress(OSError):
            facts.append(f"/proc/{pid}/{name}:\n{Path(f'/proc/{pid}/{name}').read_text().rstrip()}")
    return "\n".join([f"py-spy could not read its stack: {why}", *facts])
