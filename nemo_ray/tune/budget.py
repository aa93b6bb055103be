"""What a sweep may spend: hours and tokens, those of earlier starts included."""

import time
from collections.abc import Callable

from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.tune.course import Course

_COUNT_EVERY_S = 10.0
"""Counting tokens reads all metrics."""


class Budget:
    """The time that a sweep has taken, and whether its limits are reached."""

    def __init__(
        self, section: TuneSection, earlier_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._section, self._earlier_s, self._clock = section, earlier_s, clock
        self._began_s = clock()
        self._counted_s = -_COUNT_EVERY_S

    @property
    def elapsed_s(self) -> float:
        """Of all starts together."""
        return self._earlier_s + self._clock() - self._began_s

    def over(self, course: Course) -> str:
        """Which limit is reached, in words; "" while none is."""
        hours, tokens = self._section.max_hours, self._section.max_tokens
        if hours is not None and self.elapsed_s >= hours * 3600:
            return f"tune.max_hours: {hours:g} are over"
        if tokens is not None and self._clock() - self._counted_s >= _COUNT_EVERY_S:
            self._counted_s = self._clock()
            if tokens_of(course) >= tokens:
                return f"tune.max_tokens: {tokens:,} are trained"
        return ""


def tokens_of(course: Course) -> int:
    """Tokens that all trials have trained."""
    rows = (row for number in course.numbers for row in course.run(number).read_metrics())
    return sum(row.get("tokens", 0) for row in rows)
