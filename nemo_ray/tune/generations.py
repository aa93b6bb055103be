"""Population-based training over run directories: all trials train up to an evaluation and save; then the
worst take over checkpoints of the best, in their own directories; then all go on.

population.json is written when all that a generation changes is in place. A sweep that was killed before does
it again, from the same figures: a trial that is copied from is never one that is copied to.
"""

from collections.abc import Callable

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.tune.course import Course
from nemo_ray.tune.load import Sweep, Trial
from nemo_ray.tune.population import explore, replacements
from nemo_ray.tune.source import Begun
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import Change, Population
from nemo_ray.tune.table import describe
from nemo_ray.tune.trial import FAILED, STOPPED


class Generations:
    """A source of trials that begin again in every generation. Any number of them may run at a time."""

    def __init__(
        self,
        sweep: Sweep,
        course: Course,
        points: dict[int, Point],
        finish: Callable[[Trial], Config],
        say: Callable[[str], None],
    ) -> None:
        """points: what each trial has now; kept up to date. finish: makes a trial's configuration whole."""
        self._sweep, self._course, self._points = sweep, course, points
        self._finish, self._say = finish, say
        self._population = course.folder.read_population()
        self._queue: list[int] = []
        self._begun: set[int] = set()
        """Of this generation, in this start of the sweep."""

    def next(self) -> Begun | None:
        """See Source. Copies checkpoints where a generation is over."""
        while not self._course.closed:
            while self._queue:
                found = self._begin(self._queue.pop(0))
                if found is not None:
                    return found
            if self._course.running:
                return None
            living = [number for number in self._course.numbers if number not in self._course.ends]
            behind = [number for number in living if not self._is_there(number)]
            if not living or self._begun.intersection(behind):  # somebody stopped them: --resume goes on
                break
            if behind:
                self._queue = behind
            else:
                self._change(living)
        raise StopIteration

    @property
    def _evaluation(self) -> int:
        """That at which this generation ends."""
        interval = self._sweep.section.perturbation_interval
        assert interval is not None  # of pbt
        return (self._population.generations + 1) * interval

    def _begin(self, number: int) -> Begun | None:
        """A trial goes on; None where it cannot: then it failed."""
        self._begun.add(number)
        try:
            config = self._finish(self._sweep.make(number, self._points[number], False))
        except ConfigError as error:
            self._course.ended(number, FAILED, str(error).replace("\n", "; "))
            return None
        self._course.started(number)  # Tune says so later
        return Begun(number, config, self._evaluation)

    def _is_there(self, number: int) -> bool:
        """Whether a trial has come to the end of this generation, saved, and stopped: one that was killed
        after its last step is to be finished."""
        known, run = self._course.evaluations[number], self._course.run(number)
        if len(known) < self._evaluation or run.read_run().get("outcome") != STOPPED:
            return False
        return known[self._evaluation - 1].step in run.checkpoint_steps()

    def _change(self, living: list[int]) -> None:
        """End the generation."""
        course, evaluation = self._course, self._evaluation
        reached = {number: course.evaluations[number][evaluation - 1] for number in living}
        pairs = replacements({number: found.value for number, found in reached.items()}, course.mode)
        changes = []
        for number, source in sorted(pairs.items()):
            space, section = self._sweep.space, self._sweep.section
            about = section.seed, number, evaluation
            try:
                point = explore(space, self._points[source], self._sweep.fixed, *about)
            except ValueError as error:
                course.ended(number, FAILED, str(error))
                continue
            course.folder.copy_checkpoint(source, number, reached[source].step)
            changes.append(Change(evaluation, reached[source].step, number, source, point))
        over = Population(self._population.generations + 1, (*self._population.changes, *changes))
        course.folder.write_population(over)
        self._population, self._begun = over, set()
        for change in changes:
            self._points[change.number] = dict(change.point)
            self._say(
                f"trial {change.number} goes on from trial {change.source} at step {change.step}: "
                f"{describe(self._points[change.number])}"
            )
