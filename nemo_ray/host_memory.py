"""How much memory this machine, or the container that we are in, has left."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What may be taken without anything being swapped or killed; None where that cannot be told."""
    found = [left for left in (_of_the_machine(), _of_the_container()) if left is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_the_container() -> int | None:
    """By cgroup v2, as Kubernetes counts: what files hold there in memory is given back, if it was not read
    lately."""
    try:
        most, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        taken = int(used) - int(stat["inactive_file"])
        return None if most == "max" else max(0, int(most) - taken)
    except (OSError, ValueError, KeyError):
        return None
