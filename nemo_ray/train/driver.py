"""Who a driver is, told so that another process, perhaps on another machine, can see whether it is alive; and
what is said where two of them meet."""

import os
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nemo_ray.errors import ConfigError, NemoRayError


@dataclass(frozen=True)
class Driver:
    """A process that drives a run. `process_start` tells it from a later one that got the same number."""

    host: str
    pid_space: str
    pid: int
    process_start: int
    token: str
    submission_id: str | None
    started_at: str

    def __str__(self) -> str:
        submission = f" (submission {self.submission_id})" if self.submission_id else ""
        return f"process {self.pid} on {self.host}, since {self.started_at}{submission}"


UNREADABLE = Driver("an unknown machine", "", 0, 0, "unreadable", None, "an unknown time")
"""Stands for a driver whose file is half written, or of another version."""


def this_driver(submission_id: str | None) -> Driver:
    """This process, under a new token."""
    process = _process(os.getpid())
    return Driver(
        host=socket.gethostname(),
        pid_space=_pid_space(),
        pid=os.getpid(),
        process_start=process[1] if process is not None else 0,
        token=secrets.token_hex(8),
        submission_id=submission_id,
        started_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


def process_lives(driver: Driver) -> bool | None:
    """Whether its very process is there, be it stopped; None where that cannot be seen from here."""
    if not driver.pid_space or driver.pid_space != _pid_space():
        return None
    try:
        os.kill(driver.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's: it is there
        pass
    process = _process(driver.pid)
    if process is None:  # the mount option hidepid hides other users' processes
        return None
    state, start = process
    return state not in (b"Z", b"X") and start == driver.process_start


def refusal(folder: str, holder: Driver) -> ConfigError:
    """What a driver is told that comes while another one works."""
    return ConfigError(
        f"output_dir: another driver is at work in {folder}: {holder}; wait for its end, stop it, or name "
        "another output_dir"
    )


def require(folder: str, name: str, holder: Driver | None, driver: Driver) -> None:
    """Raises NemoRayError where the file `name`, which names `holder`, is not `driver`'s any longer."""
    if holder is None:
        raise NemoRayError(
            f"output_dir: {folder.rstrip('/')}/{name} is gone: another driver took the run over and has "
            "ended, or somebody removed the file; this run ends and changes nothing more"
        )
    if holder != driver:
        raise NemoRayError(
            f"output_dir: {folder} was taken over by another driver ({holder}), to which this one gave no "
            "sign of life; this run ends and changes nothing more"
        )


def _pid_space() -> str:
    """The boot of the machine and the pid namespace: where a number means the same process. "" where that is
    not told. Containers may share a host name, a boot, or neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[bytes, int] | None:
    """State and start time of a process; None where it is not shown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
