"""A configuration on GPUs of one kind: what fits, how fast it is, what it costs, and what would be better."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.plan.gpus import Gpu
from nemo_ray.plan.memory import FULL, Memory, estimate_memory, most_tokens, shard_sizes
from nemo_ray.plan.speed import BY_ROWS, COPIES, IN_TURNS, SHARDED, Speed, estimate_speed

PRICED_TOKENS = 100_000_000


@dataclass(frozen=True)
class Option:
    """One way to run it."""

    name: str
    keys: Mapping[str, Any]
    """What of the configuration it changes."""
    replicate: int
    shard: int
    memory: Memory
    fits: bool
    most_tokens: int
    """Of a micro-batch, that fit."""
    speed: Speed
    num_gpus: int

    @property
    def tokens_per_s(self) -> float | None:
        """Of all GPUs."""
        one = self.speed.tokens_per_s
        if one is None or self.num_gpus == 1:
            return one
        if self.shard == 1:
            return one * COPIES * self.num_gpus
        spread = IN_TURNS if self.shard == 2 else BY_ROWS
        return one * (spread if self.memory.factors_whole else SHARDED) * self.num_gpus

    def hours(self, tokens: float) -> float | None:
        """Wall time for so many tokens."""
        return None if self.tokens_per_s is None else tokens / self.tokens_per_s / 3600

    def cost(self, tokens: float, price: float | None) -> float | None:
        """At `price` for a GPU hour."""
        hours = self.hours(tokens)
        return None if hours is None or price is None else hours * self.num_gpus * price


def variants(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, changed keys): the configuration as it is, and with the base in 4 bits or not."""
    four_bit = {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}
    dense = {"adapter": "lora", "load_in_4bit": False, "quantize_moe_experts": False}
    if config.adapter is None:
        yield "all weights", {}
    elif config.load_in_4bit or config.quantize_moe_experts:
        yield "qlora", {}
        yield "lora", dense
    else:
        yield "lora", {}
        yield "qlora", four_bit


def options(config: Config, model: Mapping[str, Any], gpu: Gpu, num_gpus: int) -> list[Option]:
    """The configuration first. Each with as few GPUs to a copy of the weights as hold it, or all where none
    do, unless the configuration says how many."""
    found = []
    for name, keys in variants(config):
        changed = config.model_copy(update=keys)
        room = FULL * gpu.memory_bytes
        sizes = shard_sizes(changed, num_gpus)
        estimates = {
            size: estimate_memory(changed, model, size, use_gpu=True, room_bytes=room) for size in sizes
        }
        shard = next((size for size in sizes if estimates[size].peak <= room), sizes[-1])
        tokens = changed.micro_batch_size * changed.sequence_len
        found.append(
            Option(
                name=name,
                keys=keys,
                replicate=num_gpus // shard,
                shard=shard,
                memory=estimates[shard],
                fits=estimates[shard].peak <= room,
                most_tokens=most_tokens(changed, model, shard, room),
                speed=estimate_speed(changed, model, gpu, tokens),
                num_gpus=num_gpus,
            )
        )
    return found


def recommend(found: list[Option]) -> Option | None:
    """What was asked for, unless it does not fit, or is sharded where another need not be, which spares the
    traffic; None where nothing fits."""
    fitting = [option for option in found if option.fits]
    return min(fitting, key=lambda option: option.shard > 1, default=None)


def fewest_gpus(config: Config, model: Mapping[str, Any], gpu: Gpu, most: int = 64) -> int | None:
    """How many GPUs hold a copy of the weights together, and train; None where `most` do not."""
    room = FULL * gpu.memory_bytes
    for exponent in range(int(math.log2(most)) + 1):
        if estimate_memory(config, model, 2**exponent, use_gpu=True, room_bytes=room).peak <= room:
            return int(2**exponent)
    return None
