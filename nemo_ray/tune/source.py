"""Which trial begins next: one of those that are known from the start, or one that is proposed now."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.tune.course import Course
from nemo_ray.tune.load import Sweep, Trial
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import TrialEnd
from nemo_ray.tune.trial import FAILED


class Begun(NamedTuple):
    """A trial that begins, or goes on."""

    number: int
    config: Config
    pause_after: int | None = None
    """The evaluation, counted from 1, after which it ends for now."""


class Source(Protocol):
    """What Tune's thread asks for trials."""

    def next(self) -> Begun | None:
        """The next trial; None where it is not known yet. Raises: StopIteration where there is none left."""


class Known:
    """Trials that were there before the first one began."""

    def __init__(self, trials: Iterable[Begun]) -> None:
        self._left = iter(trials)

    def next(self) -> Begun:
        """See Source."""
        return next(self._left)


class Proposed:
    """Trials whose points depend on results.

    Trial k is proposed after the trials up to k - lag, whoever else has ended: so proposals do not depend on
    which of the trials that run beside each other is faster.
    """

    def __init__(
        self,
        sweep: Sweep,
        course: Course,
        points: dict[int, Point],
        lag: int,
        finish: Callable[[Trial], Config],
    ) -> None:
        """points: those of earlier starts, to which new ones are added; see `recall`. finish: makes a trial's
        configuration whole, or raises ConfigError."""
        self._sweep, self._course, self._points = sweep, course, points
        self._lag, self._finish = lag, finish
        self._left = course.left()

    def next(self) -> Begun | None:
        """See Source. A proposal that cannot be trained is a trial that failed."""
        while self._left:
            number = self._left[0]
            if number not in self._points and not self._may_propose(number):
                return None
            del self._left[0]
            try:
                if number not in self._points:
                    known = self._points, self._lag, number
                    self._points[number] = _propose(self._sweep, self._course, *known)
                return Begun(number, self._finish(self._sweep.make(number, self._points[number], False)))
            except (ConfigError, ValueError) as error:
                self._course.ended(number, FAILED, str(error).replace("\n", "; "))
        raise StopIteration

    def _may_propose(self, number: int) -> bool:
        return all(before in self._course.ends for before in range(number - self._lag + 1))


def recall(sweep: Sweep, course: Course, points: dict[int, Point], lag: int) -> None:
    """Add the points that a killed sweep had no time to note, up to the last trial that has ended."""
    for number in range(max(course.ends, default=-1) + 1):
        if number not in points:
            with contextlib.suppress(ValueError):  # it has none: it failed
                points[number] = _propose(sweep, course, points, lag, number)


def _propose(sweep: Sweep, course: Course, points: Mapping[int, Point], lag: int, number: int) -> Point:
    from nemo_ray.tune.suggest import Told, suggest

    ends: Mapping[int, TrialEnd] = course.ends
    told = [
        Told(points[before], ends[before] if before <= number - lag else None)
        for before in range(number)
        if before in points
    ]
    section = sweep.section
    return suggest(sweep.space, sweep.fixed, section.seed, section.mode, sweep.num_trials, number, told)
