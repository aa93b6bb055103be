"""Knowing before a run what it takes. `nemo-ray plan` prints it; others take the arithmetic from here."""

from nemo_ray.plan.gpus import seen_gpu
from nemo_ray.plan.memory import FULL, Memory, estimate_memory
from nemo_ray.plan.parameters import count_active, count_base, count_lora
from nemo_ray.plan.speed import flop_per_token

__all__ = [
    "FULL",
    "Memory",
    "count_active",
    "count_base",
    "count_lora",
    "estimate_memory",
    "flop_per_token",
    "seen_gpu",
]
