"""The optimizer and the learning rate as a function of progress."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_ray.config.schema import TrainSection


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with states in the parameters' dtype, float32."""
    return torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


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
