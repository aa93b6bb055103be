"""How fast a run is, from throughputs that were measured (docs/performance.md). Arithmetic only.

A step's products are 4 FLOP a token for each active parameter of a frozen base, 6 where all train. The rate
at which this package does them is that of the nearest measured run; of other GPUs, by their data sheets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.plan.gpus import GPUS, Gpu
from nemo_ray.plan.parameters import count_active

REFERENCE = GPUS["h100"]
_FAR = 10.0
"""From what was measured, in active parameters: beyond that the rate says nothing."""
_RECOMPUTED = 0.13
"""Of a step, where every block makes its activations again."""
COPIES, IN_TURNS, BY_ROWS, SHARDED = 0.97, 0.91, 0.84, 0.51
"""What is left of a GPU's speed beside another one with a copy of the base, with every other block of it,
with some rows of each, and where FSDP2 shards what trains too: Nano in bf16 on two H200 joined by NVLink."""


@dataclass(frozen=True)
class Measured:
    """A run on a GPU like REFERENCE, with gradient_checkpointing: auto and cuda_graphs: true."""

    what: str
    four_bit: bool
    active: float
    """Parameters that a token meets."""
    tokens: int
    """Of a micro-batch."""
    tokens_per_s: float

    @property
    def rate(self) -> float:
        """FLOP a second."""
        return 4 * self.active * self.tokens_per_s


MEASURED = (
    Measured("Nano, bf16, 4,096 tokens", False, 3.228e9, 4096, 21_347),
    Measured("Nano, bf16, 8,192 tokens", False, 3.228e9, 8192, 25_796),
    Measured("Nano, bf16, 16,384 tokens", False, 3.228e9, 16_384, 25_704),
    Measured("Nano, 4 bits, 8,192 tokens", True, 3.228e9, 8192, 22_607),
    Measured("Super, 4 bits, 8,192 tokens", True, 12.233e9, 8192, 5_464),
)


def flop_per_token(config: Config, model: Mapping[str, Any]) -> float:
    """Of a step's products: 2 for each active parameter forward, 2 for what comes in, 2 where it trains."""
    return (4 if config.adapter else 6) * count_active(model)


@dataclass(frozen=True)
class Speed:
    """Tokens a second on one GPU, and what that is taken from; None, and why it is not known."""

    tokens_per_s: float | None
    source: str


def estimate_speed(config: Config, model: Mapping[str, Any], gpu: Gpu, tokens: int) -> Speed:
    """Of one GPU alone with `tokens` in a micro-batch."""
    active, four_bit = count_active(model), config.quantize_moe_experts

    def apart(run: Measured) -> tuple[bool, float, float]:
        return run.four_bit != four_bit, _ratio(run.active, active), _ratio(run.tokens, tokens)

    nearest = min(MEASURED, key=apart)
    far = _ratio(nearest.active, active)
    if far > _FAR:
        return Speed(None, f"the nearest measured model is {far:,.0f} times as large or small")
    speed = nearest.rate / flop_per_token(config, model) * gpu.tflops / REFERENCE.tflops
    source = f"measured: {nearest.what}, on an H100 or H200"
    if config.gradient_checkpointing is True:
        speed *= 1 - _RECOMPUTED
    if not gpu.measured:
        source += f"; {gpu.name} by its data sheet"
    if not config.cuda_graphs:
        source += "; with cuda_graphs: true, without which it is slower"
    return Speed(speed, source)


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)
