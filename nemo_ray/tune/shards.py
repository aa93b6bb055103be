"""A part of a sweep for one cluster: which trials it has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ray.errors import ConfigError
from nemo_ray.tune.load import Sweep


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1: every `count`-th trial. The whole sweep is 1 of 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def numbers(self, num_trials: int) -> range:
        """The numbers of its trials, which they have in the whole sweep."""
        return range(self.number - 1, num_trials, self.count)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Shard":
        """That of the sweep whose sweep.json says `facts`."""
        return cls(*facts.get("shard", (1, 1)))


def parse_shard(text: str, sweep: Sweep) -> Shard:
    """A part of `sweep`, such as 2/3. Raises: ConfigError where it has none such, or one without trials."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard: {text} is no part; give i/n, such as 1/2 and 2/2 on two clusters")
    found = Shard(int(number), int(count))
    if not found.numbers(sweep.num_trials):
        raise ConfigError(f"--shard: {text} of {sweep.num_trials} trials has none; give fewer parts")
    if sweep.section.scheduler == "pbt" and len(found.numbers(sweep.num_trials)) < 2:
        raise ConfigError(
            f"--shard: {text} of {sweep.num_trials} trials has one, and pbt compares trials; give fewer parts"
        )
    if found.count > 1 and not sweep.trials:
        raise ConfigError(
            f"--shard: {sweep.section.search} learns from all trials; set tune.search: random to split them"
        )
    return found
