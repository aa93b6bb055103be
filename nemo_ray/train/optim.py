"""The optimizers, with states that a checkpoint can name, and the learning rate as a function of progress."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_ray.config.schema import TrainSection
from nemo_ray.model.quant import bitsandbytes


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], train: TrainSection, rank: int, world_size: int
) -> "AdamW | AdamW8bit":
    """AdamW (Loshchilov and Hutter, 2019) over named parameters, with states of 32 or 8 bits."""
    if train.optimizer == "adamw_8bit":
        return AdamW8bit(parameters, train, rank, world_size)
    return AdamW(parameters, train)


def _settings(train: TrainSection) -> dict[str, Any]:
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }


class AdamW(torch.optim.AdamW):
    """torch's, with states in the parameters' dtype, float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: TrainSection) -> None:
        # Fused: its kernels can leave a step out without the host, and no copies of all parameters are made.
        super().__init__(parameters.values(), **_settings(train), fused=True)
        self.named = dict(parameters)

    def step_unless(self, skip: torch.Tensor) -> None:
        """A step; where `skip` is 1, and not 0, it leaves all values and states as they are.

        Args:
            skip: float32 scalar on the parameters' device. Nothing waits for it.
        """
        self.found_inf = skip  # what torch's GradScaler tells the kernels by
        self.step()

    @property
    def started(self) -> bool:
        """Whether there are states."""
        return bool(self.state)

    def start_states(self) -> None:
        """Make the states that the first step would make, as places to load into."""
        for parameter in self.named.values():
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def named_states(self) -> dict[str, torch.Tensor]:
        """ "NAME/STATE" to tensors, sharded as the parameters are."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.named.items()
            for key, value in self.state[parameter].items()
        }

    def put_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Take over tensors of `named_states`; scalars come as new ones."""
        for name, parameter in self.named.items():
            for key in self.state[parameter]:
                self.state[parameter][key] = states[f"{name}/{key}"]


class AdamW8bit:
    """bitsandbytes' AdamW on this worker's part of each parameter: states in 8 bits, 256 of them to a scale.

    Blocks of scales lie within a worker's part, so the states are named by worker and fit only as many
    workers as wrote them. Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022).
    """

    _SAVED = ("state1", "state2", "absmax1", "absmax2")

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], train: TrainSection, rank: int, world_size: int
    ) -> None:
        self.named = dict(parameters)
        self._prefix = f"worker{rank}of{world_size}"
        # It knows no sharded tensors: give it the local parts, which share the parameters' memory.
        self._parts = {name: nn.Parameter(local_part(p.detach())) for name, p in self.named.items()}
        optim = bitsandbytes().optim
        self._inner = optim.AdamW8bit(
            [part for part in self._parts.values() if part.numel()], **_settings(train)
        )
        self.param_groups = self._inner.param_groups

    def step_unless(self, skip: torch.Tensor) -> None:
        """A step; where `skip` is 1, and not 0, nothing is touched.

        It waits for `skip`: bitsandbytes (0.50) counts steps on the host, and waits for the GPU itself after
        each parameter.
        """
        if not self.started:  # a checkpoint may follow
            self.start_states()
        if skip.item():
            return
        for name, part in self._parts.items():
            gradient = self.named[name].grad
            part.grad = None if gradient is None else local_part(gradient)
        self._inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for name, part in self._parts.items():
            self.named[name].grad = part.grad = None

    @property
    def started(self) -> bool:
        return bool(self._inner.state)

    def start_states(self) -> None:
        (group,) = self.param_groups
        for index, part in enumerate(group["params"]):
            self._inner.init_state(group, part, 0, index)

    def named_states(self) -> dict[str, torch.Tensor]:
        states = {}
        for name, part in self._parts.items():
            for key, value in self._inner.state[part].items():
                if key == "step":
                    states[f"{self._prefix}/{name}/{key}"] = torch.tensor(value)
                elif key in self._SAVED:
                    states[f"{self._prefix}/{name}/{key}"] = value
        return states

    def put_states(self, states: Mapping[str, torch.Tensor]) -> None:
        for name, part in self._parts.items():
            for key in self._inner.state[part]:
                if key == "step":
                    self._inner.state[part][key] = int(states[f"{self._prefix}/{name}/{key}"])
                elif key in self._SAVED:
                    self._inner.state[part][key] = states[f"{self._prefix}/{name}/{key}"]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this worker, in the same memory."""
    return tensor.tolocal_part() if isinstance(tensor, DTensor) else tensor


def learning_rate(train: TrainSection, step: int, before: float, after: float) -> float:
    """Rate of the step numbered `step` (from 0), in which the run's progress goes from `before` to `after`.

    The rate rises in a line over the warmup, whose last step has the full rate, then falls with progress.
    """
    peak = train.learning_rate
    if train.lr_scheduler == "constant":
        return peak
    if train.warmup_steps:
        if step < train.warmup_steps:
            return peak * (step + 1) / train.warmup_steps
        # The part of the run that the warmup took, known exactly with max_steps, else from the pace so far.
        warmup = train.warmup_steps * before / step
    else:
        warmup = train.warmup_ratio
        if after < warmup:
            return peak * after / warmup
    if train.lr_scheduler == "constant_with_warmup":
        return peak
    left = 1.0 - min(1.0, max(0.0, before - warmup) / max(1.0 - warmup, 1e-12))
    if train.lr_scheduler == "linear":
        return peak * left
    return peak * 0.5 * (1.0 - math.cos(math.pi * left))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
