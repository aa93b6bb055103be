"""Which trials are stopped early: successive halving that gives the same result in any order of reports.

At each rung, a number of evaluations, a trial goes on if it belongs to the best 1/eta of those trials up to
its own number that got there; the first always does. ASHA (Li et al., 2020) takes trials in the order of
arrival, so that two runs of one sweep stop different ones. Here a trial that arrives before those with lower
numbers trains on until they have arrived, or have ended; what it did beyond its rung does not count if it is
stopped. So stops depend on values only: not on the cluster, nor on how often the sweep was killed.

Hyperband (Li et al., 2018) hedges against curves that cross: brackets of trials that are halved from a later
rung on. The median rule (Golovin et al., 2017) has a rung at each evaluation, and keeps the better half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

REDUCTION = 3
_MOST_EVALUATIONS = 10**6
_BRACKETS = (0, 0, 1, 0, 2, 0, 1, 0)
"""Of eight trials one after the other: so each bracket trains about as long as the others. The first rung of
bracket b is evaluation REDUCTION**b."""
_FREE_OF_MEDIAN = 3
"""Trials that go on before there is a median to speak of."""


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

    def __init__(
        self, at: Sequence[int], num_trials: int, mode: str, eta: int = REDUCTION, free: int = 0
    ) -> None:
        """at: evaluations, ascending. mode: min or max. free: of each rung the first so many go on."""
        self.at, self._sign, self._eta, self._free = at, 1.0 if mode == "min" else -1.0, eta, free
        self._trials = [_Trial() for _ in range(num_trials)]

    def report(self, place: int, evaluation: int, value: float) -> list[Stop]:
        """A trial's figure at an evaluation, counted from 1; returns the trials that this ends.

        A figure that is no number is worse than all others. What was reported before changes nothing.
        """
        trial = self._trials[place]
        reached = len(trial.values)
        if trial.stopped or reached == len(self.at) or evaluation != self.at[reached]:
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
        reached = max((len(trial.values) for trial in self._trials), default=0)
        for rung, evaluation in enumerate(self.at[:reached]):
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
                    wanted = _wanted(before, self._eta) if len(before) >= self._free else math.inf
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


class Schedule:
    """The state of one sweep under a scheduler, by its name: what Halving is for each bracket of trials."""

    def __init__(self, name: str, num_trials: int, mode: str) -> None:
        """name: none, asha, hyperband, median or pbt, which stops nobody. mode: min or max."""
        pattern = _BRACKETS if name == "hyperband" else (0,)
        brackets = [pattern[place % len(pattern)] for place in range(num_trials)]
        self._members = [[p for p in range(num_trials) if brackets[p] == b] for b in range(max(pattern) + 1)]
        self._home = [(bracket, self._members[bracket].index(p)) for p, bracket in enumerate(brackets)]
        self._halvings = [
            _halving(name, bracket, len(members), mode) for bracket, members in enumerate(self._members)
        ]

    def report(self, place: int, evaluation: int, value: float) -> list[Stop]:
        """See Halving.report."""
        bracket, inner = self._home[place]
        return self._outer(bracket, self._halvings[bracket].report(inner, evaluation, value))

    def end(self, place: int) -> list[Stop]:
        """See Halving.end."""
        bracket, inner = self._home[place]
        return self._outer(bracket, self._halvings[bracket].end(inner))

    def rung(self, place: int, evaluation: int) -> int:
        """Which of a trial's rungs an evaluation is, from 0."""
        return self._halvings[self._home[place][0]].at.index(evaluation)

    def _outer(self, bracket: int, stops: list[Stop]) -> list[Stop]:
        return [replace(stop, place=self._members[bracket][stop.place]) for stop in stops]


def _halving(name: str, bracket: int, num_trials: int, mode: str) -> Halving:
    if name in ("none", "pbt"):
        return Halving((), num_trials, mode)
    if name == "median":
        return Halving(range(1, _MOST_EVALUATIONS), num_trials, mode, eta=2, free=_FREE_OF_MEDIAN)
    return Halving(rungs(REDUCTION**bracket, _MOST_EVALUATIONS), num_trials, mode)
