"""Parameters with an optimizer, whole or sharded, and checkpoints of them; imports little, to start fast."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nemo_ray.config.schema import TrainSection
from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint import Checkpointer, TrainState
from nemo_ray.train.optim import AdamW

SHAPES = {"a": (7, 3), "b": (2, 5), "c": (1,), "d": (64, 16)}
"""Fewer rows than workers, rows that do not divide, and a large one."""


def whole(name: str, number: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + ord(name))
    return torch.randn(SHAPES[name], generator=generator)


def one_process(number: int = 0) -> tuple[dict[str, nn.Parameter], AdamW]:
    """Parameters, and an optimizer that has made a step with their values as gradients."""
    parameters = {name: nn.Parameter(whole(name, number)) for name in SHAPES}
    return parameters, stepped(parameters)


def stepped(parameters: dict[str, nn.Parameter]) -> AdamW:
    optimizer = AdamW(parameters, TrainSection.model_validate({}))
    for parameter in parameters.values():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def sharded(layout: str, number: int = 0) -> tuple[dict[str, nn.Parameter], AdamW]:
    """The same over this group: "4", or "2x2" (copies of two shards)."""
    sizes = tuple(int(size) for size in layout.split("x"))
    mesh = init_device_mesh("cpu", sizes)
    placements = [Replicate()] * (len(sizes) - 1) + [Shard(0)]
    parts = {name: distribute_tensor(whole(name, number), mesh, placements) for name in SHAPES}
    parameters = {name: nn.Parameter(part) for name, part in parts.items()}
    return parameters, stepped(parameters)


def all_tensors(parameters: dict[str, nn.Parameter], optimizer: AdamW) -> dict[str, torch.Tensor]:
    found = {**parameters, **optimizer.named_states()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def save(
    run: RunDir, parts: tuple[dict[str, nn.Parameter], AdamW], step: int, keep: int | None = None
) -> None:
    checkpointer = Checkpointer(run, *parts, keep)
    checkpointer.start(TrainState(step=step, cursor=4 * step, data_hash=f"hash {step}"))
    checkpointer.wait()
