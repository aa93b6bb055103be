"""A command in a process session of its own, with a log, a deadline, and an end for all that it started."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = (sys.executable, "-m", "nemo_ray.train")
TUNE = (sys.executable, "-m", "nemo_ray.tune")
RUN_WITHIN_S = 300.0
"""Whole runs take 20 to 30 s on two free cores; the machine may be shared."""
_MARK = "NEMO_RAY_E2E_COMMAND"


class Command:
    """A started command. Its descendants are known by a variable in their environment, or by parentage."""

    def __init__(self, arguments: Sequence[str], log: Path, cwd: Path = ROOT, **environment: str) -> None:
        self.log = log
        self.mark = f"{_MARK}={secrets.token_hex(16)}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env={**clean, **environment, _MARK: self.mark.partition("=")[2]},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """All that it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """Its lines that begin with `error:`."""
        return [line for line in self.output.splitlines() if line.startswith("error:")]

    def wait_until(self, happened: Callable[[], object], seconds: float = RUN_WITHIN_S) -> None:
        """Return as soon as `happened()`; fail where the command ends, or the time is up, before that."""
        until = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < until, f"not within {seconds:g} s:\n{self.output}"
            time.sleep(0.03)

    def end(self, seconds: float = RUN_WITHIN_S) -> int:
        """Its exit code, as soon as it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output}") from None

    def ctrl_c(self) -> None:
        """As a terminal sends it: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    # -- what it started -------------------------------------------------------------------------

    def tree(self) -> dict[int, str]:
        """Its live processes, Ray's included: pid to command line."""
        parents: dict[int, int] = {}
        titles: dict[int, str] = {}
        marked: set[int] = set()
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                folder = Path(f"/proc/{pid}")
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z":
                    continue
                parents[pid] = int(parent)
                titles[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if self.mark.encode() in (folder / "environ").read_bytes():
                    marked.add(pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        mine = marked | ({self.process.pid} & parents.keys())
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        return {pid: titles[pid] for pid in mine if pid in titles}

    def kill_tree(self) -> None:
        """SIGKILL to every one of its processes, as when the machine dies."""
        until = time.monotonic() + 20
        while pids := self.tree():
            assert time.monotonic() < until, f"these survive SIGKILL: {pids}"
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()
            time.sleep(0.05)
        self.process.wait(10)

    def leaves_nothing_behind(self, seconds: float = 20) -> bool:
        """Whether all of its processes are gone, after a moment for the last ones to go."""
        until = time.monotonic() + seconds
        while self.tree():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True
