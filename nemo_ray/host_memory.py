"""How much memory this machine, or the container or job that we are in, has left."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OURS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")

# The files of a group: what it may take, what it has taken, and what of that is given back when it is needed
# (files that are in memory, and have not been read lately).
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes() -> int | None:
    """What may be taken without anything being swapped or killed; None where that cannot be told."""
    found = [_of_the_machine()]
    for group, (most, used, inactive) in _groups():
        around = [above for above in (group, *group.parents) if above.is_relative_to(_CGROUP)]
        found += [_of_a_group(above, most, used, inactive) for above in around]
    return min((left for left in found if left is not None), default=None)


def _of_the_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _groups() -> list[tuple[Path, tuple[str, str, str]]]:
    """This process's control group, as Kubernetes and Slurm limit its memory; within a container it may be
    seen as the uppermost one, which is always told."""
    found = [(_CGROUP, _V2), (_CGROUP / "memory", _V1)]
    try:
        lines = _OURS.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append((_CGROUP / path.lstrip("/"), _V2))
        elif "memory" in controllers.split(","):
            found.append((_CGROUP / "memory" / path.lstrip("/"), _V1))
    return found


def _of_a_group(group: Path, most: str, used: str, inactive: str) -> int | None:
    try:
        limit = (group / most).read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / used).read_text()) - int(stat[inactive])
        return None if limit == "max" else max(0, int(limit) - taken)
    except (OSError, ValueError, KeyError):
        return None
