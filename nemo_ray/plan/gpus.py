"""GPUs by name: the memory that torch sees, and the rate of bf16 products by their data sheets."""

from dataclasses import dataclass
from difflib import get_close_matches

from nemo_ray.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory_gib: float
    tflops: float
    """Dense bf16 products, without sparsity."""
    measured: bool = False
    """Whether this package's speed was measured on one."""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79.1, 989, measured=True),
        Gpu("h200", 139.8, 989, measured=True),
        Gpu("a100", 79.1, 312),
        Gpu("a100-40gb", 39.4, 312),
        Gpu("l40s", 44.4, 362),
        Gpu("b200", 178.0, 2250),
        Gpu("rtx4090", 23.5, 165),
        Gpu("rtx5090", 31.4, 210),
    )
}


# A part of what the driver calls it, and the name here.
_SEEN_AS = (
    ("H100 80GB HBM3", "h100"),
    ("H200", "h200"),
    ("A100-SXM4-80GB", "a100"),
    ("A100 80GB", "a100"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100-PCIE-40GB", "a100-40gb"),
    ("L40S", "l40s"),
    ("B200", "b200"),
    ("RTX 4090", "rtx4090"),
    ("RTX 5090", "rtx5090"),
)


def seen_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, as in "NVIDIA H100 80GB HBM3"; None for others."""
    return next((GPUS[name] for part, name in _SEEN_AS if part in device_name), None)


def find_gpu(name: str) -> Gpu:
    """Raises: ConfigError for one that is not in the table, naming the nearest."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        near = get_close_matches(name.lower(), GPUS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"give one of {', '.join(GPUS)}"
        raise ConfigError(f"--gpu: {name!r} is not known; {advice}")
    return gpu
