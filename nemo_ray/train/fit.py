"""Whether the GPUs of a cluster, or this machine, can hold a run at all, by its estimate: refused before it
starts."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.host_memory import available_bytes
from nemo_ray.plan import estimate_memory
from nemo_ray.plan.gpus import GIB, GPUS, Gpu
from nemo_ray.plan.memory import shard_sizes
from nemo_ray.train.resources import Demand

PROCESS_BYTES = 2**29  # of a worker that has imported what it needs
_KIND = "accelerator_type:"
# Ray's names for kinds of GPU that differ from those of the plan. "A100" alone may have 40 or 80 GB.
_NAMES = {"A100-80G": "a100", "A100-40G": "a100-40gb", "A100": None}


def check_fit(
    config: Config, shape: Mapping[str, Any], wanted: Demand, nodes: Sequence[Mapping[str, float]]
) -> None:
    """Does nothing where the kinds of GPU, or their memory, are not known.

    Args:
        nodes: each node's total resources, as Ray has them.

    Raises: ConfigError where no layout of the run fits into the largest of these GPUs.
    """
    gpus = _kinds(config.ray.accelerator_type, nodes) if wanted.use_gpu else []
    if not gpus:
        return
    largest = max(gpus, key=lambda gpu: gpu.memory_gib)
    room = largest.memory_bytes * min(1.0, wanted.per_worker["GPU"])
    count = wanted.num_workers
    least = _least_bytes(config, shape, count, room)
    if least > room:
        raise ConfigError(
            f"the run takes about {least / GIB:.1f} GiB on each of {count} GPU(s), and {largest.name} has "
            f"{room / GIB:.1f} for it; `nemo-ray plan CONFIG --gpu {largest.name}` says what would fit, and "
            "--force tries all the same"
        )


def check_fits_here(config: Config, shape: Mapping[str, Any], wanted: Demand) -> None:
    """The same of a run on the CPUs of this machine.

    Raises: ConfigError where its workers take more memory than is left.
    """
    room = available_bytes()
    if wanted.use_gpu or room is None:
        return
    count = wanted.num_workers
    each = PROCESS_BYTES + _least_bytes(config, shape, count, None)
    if count * each > room:
        raise ConfigError(
            f"the run takes about {each / GIB:.1f} GiB in each of {count} worker(s) (ray.num_workers), and "
            f"this machine has {room / GIB:.1f} left for all; use fewer of them, or less of "
            "micro_batch_size or sequence_len; --force tries all the same"
        )


def _least_bytes(config: Config, shape: Mapping[str, Any], count: int, gpu_bytes: float | None) -> float:
    """What a worker needs at least, whatever the layout; on CPUs where `gpu_bytes` is None."""
    sizes = shard_sizes(config, count)
    on_gpu = gpu_bytes is not None
    return min(estimate_memory(config, shape, size, on_gpu, room_bytes=gpu_bytes).peak for size in sizes)


def _kinds(asked: str | None, nodes: Sequence[Mapping[str, float]]) -> list[Gpu]:
    """The kinds of GPU that workers may get; none where one of them is not known."""
    names = {asked} if asked is not None else set()
    if asked is None:
        for node in nodes:
            if node.get("GPU", 0.0) > 0:
                names |= {name.removeprefix(_KIND) for name in node if name.startswith(_KIND)} or {"unknown"}
    found = [GPUS.get(_NAMES.get(name, name.lower()) or "") for name in names]
    return [] if None in found else [gpu for gpu in found if gpu is not None]
