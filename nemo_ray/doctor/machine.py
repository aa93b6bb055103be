"""One machine: what is installed, its GPUs, its disks and its shared memory. Knows no Ray.

`examine` looks and judges; each judgement is a function of what was seen, so that it can be shown what no
test machine has.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from nemo_ray.doctor.findings import Finding, error, ok, warning

GIB = 2**30
LITTLE_DISK_BYTES, NO_DISK_BYTES = 20 * GIB, GIB
SHARED_MEMORY_BYTES = 256 * 2**20
"""Ray's smallest object store here; one that does not fit into /dev/shm lies on the disk."""
USED_SHARE = 0.05
"""Of a GPU's memory, what others may use before it is told."""
SHOWN = ("ray", "torch", "transformers", "peft", "pyarrow")
_WITHIN_S = 10


class Gpu(NamedTuple):
    """What nvidia-smi says of one."""

    name: str
    total_bytes: int
    used_bytes: int
    driver: str


class Torch(NamedTuple):
    """What torch says: its CUDA version (None: built without), and whether it can use a GPU here."""

    version: str
    cuda: str | None
    available: bool


def examine(folders: Mapping[str, str], computes: bool = True) -> Iterator[Finding]:
    """Look at this machine. `folders`: by the key that names them, those that lie on its disks. `computes`:
    whether models are to run in this process."""
    yield judge_versions(installed_versions(), requirements())
    yield judge_shared_memory(shared_memory_bytes())
    for key, folder in {"temporary files": tempfile.gettempdir(), **folders}.items():
        yield judge_disk(key, folder)
    gpus, torch_here = find_gpus(), find_torch()
    yield from judge_gpus(gpus, torch_here)
    if computes:
        yield from judge_arithmetic(bool(gpus) and torch_here.available)  # last: it may compile kernels


# -- packages -------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """What the installed package needs, without its extras; nothing is known of a bare checkout."""
    try:
        lines = importlib.metadata.requires("nemo-ray") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [wanted for line in lines if not (wanted := Requirement(line)).marker]


def installed_versions() -> dict[str, str]:
    """Version of each installed package, by its normalized name."""
    return {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }


def judge_versions(installed: Mapping[str, str], wanted: Sequence[Requirement]) -> Finding:
    """Whether all packages are there, and new enough."""
    wrong = []
    for requirement in wanted:
        name = requirement.name.lower().replace("_", "-")
        version = installed.get(name)
        if version is None:
            wrong.append(f"{name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} ({requirement.specifier} is needed)")
    if wrong:
        return error(
            "versions", ", ".join(wrong), "install the package again: pip install -c constraints.txt -e ."
        )
    shown = [f"{name} {installed[name]}" for name in SHOWN if name in installed]
    return ok("versions", ", ".join([f"python {platform.python_version()}", *shown]))


# -- GPUs -----------------------------------------------------------------------------------------


def find_gpus() -> list[Gpu]:
    """The GPUs of this machine; none where there is no driver."""
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_WITHIN_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [Gpu(name, int(total) << 20, int(used) << 20, driver) for name, total, used, driver in rows]


def find_torch() -> Torch:
    """Of the torch that is installed."""
    import torch

    return Torch(torch.__version__, torch.version.cuda, torch.cuda.is_available())


def judge_gpus(gpus: Sequence[Gpu], torch_here: Torch) -> list[Finding]:
    """Driver, torch and what others use of the memory."""
    if not gpus:
        return [ok("GPU", "none: what runs here runs on CPUs")]
    kinds = ", ".join(
        f"{sum(g.name == name for g in gpus)} x {name}" for name in dict.fromkeys(g.name for g in gpus)
    )
    driver = f"driver {gpus[0].driver}"
    if torch_here.cuda is None:
        return [
            error(
                "GPU",
                f"{kinds}, {driver}, but torch {torch_here.version} is built without CUDA",
                "install a build of torch for CUDA (pytorch.org/get-started)",
            )
        ]
    if not torch_here.available:
        return [
            error(
                "GPU",
                f"{kinds}, {driver}, but torch {torch_here.version} (CUDA {torch_here.cuda}) cannot use them",
                f"update the driver to one for CUDA {torch_here.cuda}, and look at CUDA_VISIBLE_DEVICES "
                f"({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            )
        ]
    found = [ok("GPU", f"{kinds}, {driver}, torch for CUDA {torch_here.cuda}")]
    busy = [
        f"{number}: {gpu.used_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB"
        for number, gpu in enumerate(gpus)
        if gpu.used_bytes > USED_SHARE * gpu.total_bytes
    ]
    if busy:
        remedy = "end what uses it (nvidia-smi lists the processes), or leave it out by CUDA_VISIBLE_DEVICES"
        found.append(warning("GPU memory", f"in use: GPU {', GPU '.join(busy)}", remedy))
    else:
        found.append(ok("GPU memory", f"{min(gpu.total_bytes for gpu in gpus) / GIB:.1f} GiB each, free"))
    return found


# -- arithmetic -----------------------------------------------------------------------------------


def judge_arithmetic(gpu: bool) -> list[Finding]:
    """Whether the kernel packages are there, and the patched model computes what it should on this device."""
    import torch

    from nemo_ray.doctor.exactness import measure
    from nemo_ray.errors import PatchError
    from nemo_ray.model.ssd import missing_kernels

    device = torch.device("cuda" if gpu else "cpu")
    found = []
    if gpu:
        missing = missing_kernels(device)
        installed = "mamba-ssm and causal-conv1d are there"
        if missing is None:
            found.append(ok("kernels", installed))
        else:
            says, _, remedy = missing.rpartition("; ")
            found.append(warning("kernels", says, remedy))
    try:
        off = measure(device)
    except PatchError as failed:
        return [*found, error("exactness", str(failed), "install the versions of constraints.txt")]
    except Exception as failed:  # a kernel that does not compile says so in its own way
        words = f"{type(failed).__name__}: {(str(failed).splitlines() or [''])[0][:200]}"
        remedy = "build mamba-ssm and causal-conv1d for this torch and GPU (the README says how)"
        return [
            *found,
            error(
                "exactness",
                f"a small model fails on the {device.type}: {words}",
                remedy if gpu else "install the versions of constraints.txt",
            ),
        ]
    return [*found, judge_exactness(off, device.type)]


TOLERANCE = 1e-3
"""Of the logits' scale, in float32; a wrong kernel is off by tenths."""


def judge_exactness(off: float, kind: str) -> Finding:
    """`off`: of a small packed model on this device, from the torch reference on the CPU."""
    if off > TOLERANCE:
        return error(
            "exactness",
            f"a small model on the GPU is {off:.0e} from the reference ({TOLERANCE:.0e} is allowed)",
            "build mamba-ssm and causal-conv1d again for this torch and GPU (the README says how)",
        )
    beside = f", and the GPU gives what the reference does, within {off:.0e}" if kind == "cuda" else ""
    return ok("exactness", f"packed documents see only themselves{beside}")


# -- disks and memory -----------------------------------------------------------------------------


def judge_disk(
    key: str,
    folder: str,
    usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage,
) -> Finding:
    """Room in a folder, or where it will be made, and whether it can be written."""
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        return error(key, f"{there} is a file", "name a folder")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as failed:
        return error(key, f"{there} cannot be written: {failed.strerror or failed}", "name another folder")
    free = usage(there)[2]
    says = f"{folder}: {free / GIB:.1f} GiB free"
    if free < NO_DISK_BYTES:
        return error(key, says, "make room, or name a folder on a larger disk")
    if free < LITTLE_DISK_BYTES:
        return warning(
            key, says, f"checkpoints and shards may need more than {LITTLE_DISK_BYTES / GIB:.0f} GiB"
        )
    return ok(key, says)


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm; None where a system has none."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/dev/shm").total
    return None


def judge_shared_memory(size_bytes: int | None) -> Finding:
    """Whether Ray's object store fits."""
    if size_bytes is None or size_bytes >= SHARED_MEMORY_BYTES:
        size = "not used here" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"
        return ok("shared memory", size)
    return warning(
        "shared memory",
        f"/dev/shm has {size_bytes / 2**20:.0f} MiB, so Ray's objects lie on the disk",
        "start the container with --shm-size=2g, or more",
    )
