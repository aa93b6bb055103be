"""Successive halving that gives the same result in whatever order trials report.

At each rung, a number of evaluations, a trial goes on if it belongs to the best 1/eta of those trials up to
its own number that got there; the first always does. ASHA (Li et al., 2020) takes trials in the order of
arrival, so that two runs of one sweep stop different ones. Here a trial that arrives before those with lower
numbers trains on until they have arrived, or have ended; what it did beyond its rung does not count if it is
stopped. So stops depend on values only: not on the cluster, nor on how often the sweep was killed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

REDUCTION = 3


def rungs(first: int, last: int, eta: int = REDUCTION) -> tuple[int, ...]:
    """Evaluations first, first * eta, ..., below `last`: who gets there has ended anyway."""
    found, at = [], first
    while at < last:
        found.append(at)
        at *= eta
    return tuple(found)


@dataclass(frozen=True)
class Stop:
    """A trial that ends at a rung, and the value that it should have had."""

    place: int
    """Its place among the sweep's."""
    evaluation: int
    value: float
    wanted: float


@dataclass
class _Trial:
    values: list[float] = field(default_factory=list)
    """At the rungs that it has reached, in order; smaller is better."""
    passed: int = 0
    """Rungs at which it was allowed to go on."""
    stopped: bool = False
    over: bool = False
    """It reports nothing more."""


class Halving:
    """The state of one sweep: a function of all reports, in any order that each trial could have made."""

    def __init__(self, at: Sequence[int], num_trials: int, mode: str, eta: int = REDUCTION) -> None:
        """at: evaluations, ascending. mode: min or max."""
        self._at, self._sign, self._eta = tuple(at), 1.0 if mode == "min" else -1.0, eta
        self._trials = [_Trial() for _ in range(num_trials)]

    def report(self, place: int, evaluation: int, value: float) -> list[Stop]:
        """A trial's figure at an evaluation, counted from 1; returns the trials that this ends.

        A figure that is no number is worse than all others. What was reported before changes nothing.
        """
        trial = self._trials[place]
        reached = len(trial.values)
        if trial.stopped or reached == len(self._at) or evaluation != self._at[reached]:
            return []
        trial.values.append(math.inf if math.isnan(value) else self._sign * value)
        return self._judge()

    def end(self, place: int) -> list[Stop]:
        """A trial that came to its end, or failed: it reaches no further rung.

        It may be among those that are stopped, now or later: then it counts as it was at that rung.
        """
        self._trials[place].over = True
        return self._judge()

    def _judge(self) -> list[Stop]:
        stops = []
        for rung, evaluation in enumerate(self._at):
            before: list[float] = []
            for place, trial in enumerate(self._trials):
                if trial.stopped and trial.passed < rung:
                    continue
                if trial.passed < rung or len(trial.values) <= rung:
                    if trial.over and len(trial.values) <= rung and trial.passed == len(trial.values):
                        continue
                    break  # it may come here yet: those after it wait
                value = trial.values[rung]
                if trial.passed == rung and not trial.stopped:
                    wanted = _wanted(before, self._eta)
                    if value > wanted:
                        trial.stopped = True
                        stops.append(Stop(place, evaluation, self._sign * value, self._sign * wanted))
                    else:
                        trial.passed += 1
                before.append(value)
        return stops


def _wanted(before: Sequence[float], eta: int) -> float:
    """What the next one must have, to be in the best 1/eta of them all, rounded up."""
    place = math.ceil((len(before) + 1) / eta)
    return sorted(before)[place - 1] if place <= len(before) else math.inf
