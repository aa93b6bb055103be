"""What a sweep has spent, earlier starts included, and whether one of its limits is reached."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.tune.course import Course

_COUNT_EVERY_S = 10.0
"""Counting steps and tokens reads all metrics."""


@dataclass(frozen=True)
class Spent:
    """What trials took, by their numbers."""

    seconds: Mapping[int, float]
    """From the start of a trial's process to its end."""
    gpus: Mapping[int, float]
    """Of a trial, a part of one included."""
    price: float | None
    """Of a GPU for an hour."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Spent":
        """What sweep.json says."""
        seconds, gpus = (dict(enumerate(facts.get(name, ()))) for name in ("trial_seconds", "trial_gpus"))
        return cls(seconds, gpus, facts["tune"].get("price_per_gpu_hour"))

    @property
    def most_gpus(self) -> float:
        """Of any trial; 0 where none uses one."""
        return max(self.gpus.values(), default=0.0)

    def gpu_hours(self, number: int | None = None) -> float:
        """Of one trial, or of all."""
        numbers = self.seconds if number is None else (number,)
        return sum(self.seconds.get(n, 0.0) / 3600 * self.gpus.get(n, 0.0) for n in numbers)

    def cost(self, number: int | None = None) -> float | None:
        """Of one trial, or of all; None where no price is given, or no GPU is used."""
        return self.gpu_hours(number) * self.price if self.price is not None and self.most_gpus else None


class Budget:
    """The time that a sweep and its trials have taken, and its limits."""

    def __init__(
        self,
        section: TuneSection,
        earlier: Mapping[str, Any],
        num_trials: int,
        gpus_per_trial: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`earlier`: sweep.json of the sweep that is continued, or nothing."""
        self._section, self._clock = section, clock
        self._gpus = dict.fromkeys(range(num_trials), gpus_per_trial)
        self._earlier_s = earlier.get("elapsed_s", 0.0)
        self._seconds: dict[int, float] = defaultdict(float, enumerate(earlier.get("trial_seconds", ())))
        self._began_s = self._looked_s = clock()
        self._counted_s = -_COUNT_EVERY_S

    @property
    def elapsed_s(self) -> float:
        """Of all starts together."""
        return self._earlier_s + self._clock() - self._began_s

    @property
    def spent(self) -> Spent:
        """What the trials took so far."""
        return Spent(dict(self._seconds), self._gpus, self._section.price_per_gpu_hour)

    def facts(self) -> dict[str, Any]:
        """For sweep.json, from which a later start goes on."""
        seconds = [round(self._seconds.get(number, 0.0), 1) for number in self._gpus]
        return {"elapsed_s": self.elapsed_s, "trial_seconds": seconds, "trial_gpus": [*self._gpus.values()]}

    def count(self, running: Iterable[int]) -> None:
        """The time since the last call belongs to the trials that run."""
        now_s = self._clock()
        for number in running:
            self._seconds[number] += now_s - self._looked_s
        self._looked_s = now_s

    def over(self, course: Course) -> str:
        """Which limit is reached, in words; "" while none is."""
        section, cost = self._section, self.spent.cost()
        if section.max_hours is not None and self.elapsed_s >= section.max_hours * 3600:
            return f"tune.max_hours: {section.max_hours:g} are over"
        if section.max_cost is not None and cost is not None and cost >= section.max_cost:
            return f"tune.max_cost: {section.max_cost:g} are spent"
        counts = section.max_tokens is not None or section.max_steps is not None
        if counts and self._clock() - self._counted_s >= _COUNT_EVERY_S:
            self._counted_s = self._clock()
            steps, tokens = trained(course)
            if section.max_steps is not None and steps >= section.max_steps:
                return f"tune.max_steps: {section.max_steps:,} are trained"
            if section.max_tokens is not None and tokens >= section.max_tokens:
                return f"tune.max_tokens: {section.max_tokens:,} are trained"
        return ""


def trained(course: Course) -> tuple[int, int]:
    """(steps, tokens) that all trials have trained."""
    rows = [row for number in course.numbers for row in course.run(number).read_metrics() if "loss" in row]
    return len(rows), sum(row.get("tokens", 0) for row in rows)
