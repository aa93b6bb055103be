"""How many workers, with what, and whether they fit: arithmetic on a configuration and a cluster's nodes."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_ray.config.schema import Config, RaySection
from nemo_ray.errors import ClusterError, ConfigError

DATA_TASK_CPUS = 1.0
"""Logical CPUs of one task of the data pipeline."""


@dataclass(frozen=True)
class Demand:
    """What Ray Train will ask for."""

    num_workers: int
    """The most; steps are split over so many."""
    use_gpu: bool
    per_worker: dict[str, float]
    """Ray resources of one worker, complete: CPU, GPU where used, and what the configuration adds."""
    at_least: int | None = None
    """How many are enough to start, and to go on after a loss; None where all are needed."""

    @property
    def worker_cpus(self) -> float:
        """CPUs of all workers together."""
        return self.num_workers * self.per_worker["CPU"]


def gpus_here(environ: Mapping[str, str]) -> int:
    """GPUs that this process may use, without importing torch: CUDA_VISIBLE_DEVICES, else nvidia-smi."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return len([name for name in names if name and name != "-1"])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    if listed.returncode != 0:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def cpus_here() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_num_workers(ray: RaySection, connected: bool) -> None:
    """Raises: ConfigError where the number of workers must be given and is not."""
    if connected and ray.num_workers is None:
        raise ConfigError("ray.num_workers is required on a running cluster: the number of training workers")


def demand(config: Config, num_gpus: float) -> Demand:
    """Workers and their resources, defaults filled in.

    `num_gpus`: of this machine for a local Ray, else of the cluster.
    Raises: ConfigError where the mesh does not fit the workers, or their resources contradict each other.
    """
    ray = config.ray
    use_gpu = ray.use_gpu if ray.use_gpu is not None else num_gpus > 0
    here = max(1, int(num_gpus)) if use_gpu else 1
    asked = ray.num_workers
    at_least, num_workers = asked if isinstance(asked, tuple) else (None, asked or here)
    check_mesh(num_workers, config.dp_shard_size, config.dp_replicate_size)
    per_worker = {"CPU": 1.0, **ray.resources_per_worker}
    if use_gpu:
        per_worker = {"GPU": 1.0, **per_worker}
    elif per_worker.pop("GPU", 0.0) > 0:
        raise ConfigError(
            "ray.resources_per_worker asks for GPUs, but none are used; set ray.use_gpu=true or remove GPU"
        )
    if per_worker["CPU"] <= 0:
        raise ConfigError("ray.resources_per_worker: CPU is 0, but Ray needs more than that; 0.01 works")
    return Demand(num_workers, use_gpu, per_worker, at_least)


def check_mesh(num_workers: int, shard: int | None, replicate: int | None) -> None:
    """Raises: ConfigError where dp_shard_size x dp_replicate_size is not the number of workers."""
    if shard is not None and replicate is not None and shard * replicate != num_workers:
        raise ConfigError(
            f"dp_shard_size ({shard}) x dp_replicate_size ({replicate}) is {shard * replicate}, "
            f"but there are {num_workers} workers (ray.num_workers)"
        )
    for name, size in (("dp_shard_size", shard), ("dp_replicate_size", replicate)):
        if size is not None and num_workers % size != 0:
            raise ConfigError(f"{name} ({size}) does not divide the number of workers ({num_workers})")


def layout_is_open(config: Config, use_gpu: bool) -> bool:
    """Whether workers choose, by the memory that they find, how many of them share a copy of the weights."""
    return use_gpu and config.dp_shard_size is None and config.dp_replicate_size is None


def mesh(num_workers: int, shard: int | None, replicate: int | None) -> tuple[int, int]:
    """(replicate, shard) sizes; what is not given is filled in, all sharded where neither is."""
    if shard is None:
        shard = num_workers // (replicate or 1)
    return num_workers // shard, shard


def local_cpus(wanted: Demand) -> int:
    """Logical CPUs for a local Ray: the workers' and one data task's, also where the machine has fewer."""
    return max(cpus_here(), -int(-(wanted.worker_cpus + DATA_TASK_CPUS) // 1))


def bundle(wanted: Demand, accelerator_type: str | None) -> dict[str, float]:
    """Ray resources of one worker, the kind of GPU among them."""
    if accelerator_type is None:
        return dict(wanted.per_worker)
    return {**wanted.per_worker, f"accelerator_type:{accelerator_type}": 0.001}


def place(wanted: Demand, nodes: Sequence[Mapping[str, float]], accelerator_type: str | None) -> bool:
    """Whether data can be prepared while the workers train: their CPUs + one data task's <= all CPUs.

    False: all CPUs go to the workers, so data is prepared first. `nodes`: each node's total resources.
    Raises: ClusterError where the workers do not fit at all, which Ray would wait for without end.
    """
    per_worker = bundle(wanted, accelerator_type)
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    left = wanted.num_workers
    spare = 0.0
    for node in sorted(nodes, key=lambda node: node.get("GPU", 0.0), reverse=True):
        asked = [(name, amount) for name, amount in per_worker.items() if amount > 0]
        room = min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in asked)
        here = min(room, left)
        left -= here
        spare = max(spare, node.get("CPU", 0.0) - here * per_worker["CPU"])
    if wanted.num_workers - left < (wanted.at_least or wanted.num_workers):
        raise ClusterError(_does_not_fit(wanted, per_worker, nodes, wanted.num_workers - left))
    if total_cpus < DATA_TASK_CPUS:
        raise ClusterError(
            f"the cluster has {total_cpus:g} CPUs, but preparing data needs {DATA_TASK_CPUS:g}; "
            "start its nodes with --num-cpus"
        )
    return spare >= DATA_TASK_CPUS - 1e-9


def _does_not_fit(
    wanted: Demand, per_worker: Mapping[str, float], nodes: Sequence[Mapping[str, float]], fitting: int
) -> str:
    def amounts(values: Mapping[str, float]) -> str:
        return " + ".join(f"{values.get(name, 0.0):g} {name}" for name in per_worker)

    needed = wanted.at_least or wanted.num_workers
    totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in per_worker}
    return (
        f"{needed} workers with {amounts(per_worker)} each do not fit: the cluster has "
        f"{amounts(totals)} on {len(nodes)} node(s), room for {fitting}; set "
        f"ray.num_workers={max(fitting, 1)}, lower ray.resources_per_worker, or add nodes"
    )
