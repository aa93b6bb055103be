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


def find_gpu(name: str) -> Gpu:
    """Raises: ConfigError for one that is not in the table, naming the nearest."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        near = get_close_matches(name.lower(), GPUS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"give one of {', '.join(GPUS)}"
        raise ConfigError(f"--gpu: {name!r} is not known; {advice}")
    return gpu
