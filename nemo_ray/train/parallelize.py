"""How a model lies over the workers: recomputation first, then FSDP2 over a mesh, or plain copies.

Three layouts, from two integers whose product is the number of workers:
- shard = all: each worker holds a part of the model;
- replicate x shard: sharded within a group, copied across groups (HSDP);
- shard = 1: each worker holds the whole model, and only gradients are summed. FSDP2 would keep a second copy.

Where all weights train FSDP2 shards them, with gradients and the optimizer's states. A frozen base is spread
by frozen_shards.py, and what the adapter trains is whole on each worker; where that takes too much memory,
FSDP2 shards both.

The sum over copies is one collective after the backward pass. Sent block by block beside that pass, it kept
multiprocessors from matrix products that are laid out for all of them: on two H200 these took 14 ms longer in
a step of Nano's, to hide 8 ms.

Where none is asked for, as few workers share a copy as can hold one: what is not sharded is not sent either,
and a step whose weights stay where they are can be recorded as a CUDA graph.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from nemo_ray.errors import ConfigError
from nemo_ray.train.frozen_shards import FrozenShards

ALIGNED = 64  # elements: where a gradient begins among all, kernels that read 16 bytes at once can begin too


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's two axes."""

    replicate: int
    shard: int

    @classmethod
    def choose(
        cls,
        world_size: int,
        shard: int | None,
        replicate: int | None,
        node_size: int = 1,
        fits: Callable[[int], bool] = lambda shard: False,
    ) -> "Layout":
        """Fill in what is not given.

        Args:
            node_size: workers on a node.
            fits: whether so many workers can hold a copy of the weights together, and train.

        Raises: ConfigError where the sizes do not multiply to `world_size`.
        """
        if shard is None and replicate is None:
            # Within a node, or over whole nodes: a copy that lies across two of them is sent by the slow way.
            even = [size for size in range(1, world_size) if world_size % size == 0]
            near = [size for size in even if node_size % size == 0 or size % node_size == 0]
            shard = next((size for size in near if fits(size)), world_size)
        if shard is None:
            shard = world_size // (replicate or 1)
        if replicate is None:
            replicate = world_size // shard
        if replicate * shard != world_size:
            raise ConfigError(
                f"dp_replicate_size ({replicate}) x dp_shard_size ({shard}) must be the number of workers, "
                f"{world_size}"
            )
        return cls(replicate, shard)


class Parallel:
    """What the step needs to know of the layout."""

    def __init__(
        self, model: nn.Module, layout: Layout, world_size: int, frozen: FrozenShards | None = None
    ) -> None:
        self.model, self.layout, self.frozen = model, layout, frozen
        self.sharded = layout.shard > 1 and frozen is None
        """Whether what trains is sharded, which FSDP2 does."""
        self.world_size = world_size
        # FSDP2 averages gradients over all workers; the loss is divided by the global number of targets.
        self.loss_scale = float(world_size) if self.sharded else 1.0
        self._gradients: torch.Tensor | None = None

    def set_last_micro_batch(self, last: bool) -> None:
        """Reduce gradients once a step: after the last of its backward passes."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)

    def sum_over_workers(self, value: torch.Tensor) -> None:
        """Sum a tensor over the workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)

    @property
    def untracked_bytes(self) -> int:
        """Bytes on this worker's GPU that torch's allocator does not count."""
        return self.frozen.untracked_bytes if self.frozen is not None else 0

    @property
    def sums_gradients(self) -> bool:
        """Whether `sync_gradients` has copies of what trains to sum over; otherwise FSDP2 does that."""
        return self.world_size > 1 and not self.sharded

    def hold_weights(self) -> None:
        """After the model was filled: put a frozen base that is spread in its place."""
        if self.frozen is not None:
            self.frozen.hold(self.model)

    def hold_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Where there are copies, make each parameter's gradient a part of one tensor, in which it stays."""
        if not self.sums_gradients:
            return
        parameters = list(parameters)
        ends = list(accumulate(-(-p.numel() // ALIGNED) * ALIGNED for p in parameters))
        self._gradients = torch.zeros(ends[-1], dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, start in zip(parameters, [0, *ends[:-1]], strict=True):
            parameter.grad = self._gradients[start : start + parameter.numel()].view_as(parameter)

    def sync_gradients(self) -> None:
        """Sum the gradients over the copies."""
        if self._gradients is not None:
            dist.all_reduce(self._gradients)


def parallelize(
    model: nn.Module, layout: Layout, device: torch.device, recompute: bool, factors_whole: bool = True
) -> Parallel:
    """Lay a model that is still on meta over the workers, in place; `hold_weights` follows when it is filled.

    Args:
        recompute: whether every block makes its activations again in the backward pass.
        factors_whole: whether each worker is to hold all of what trains beside a frozen base.

    Its methods `packed_logits` and `target_log_probs` may then be called on every worker together.
    """
    for block in model.model.layers:
        block.recompute = recompute
    world_size = layout.replicate * layout.shard
    if layout.shard > 1:
        if layout.replicate > 1:
            mesh = init_device_mesh(
                device.type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard")
            )
        else:
            mesh = init_device_mesh(device.type, (layout.shard,), mesh_dim_names=("shard",))
        if factors_whole and any(not p.requires_grad for p in model.model.layers.parameters()):
            frozen = FrozenShards(model, mesh["shard"].get_group(), device)
            return Parallel(model, layout, world_size, frozen)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        # The root keeps its parameters whole after a forward pass by default: between an evaluation and the
        # next backward pass `model.parameters()` would then give other objects than the optimizer holds.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for method in ("packed_logits", "target_log_probs"):
            register_fsdp_forward_method(model, method)
        assert isinstance(model, FSDPModule)
    return Parallel(model, layout, world_size)
