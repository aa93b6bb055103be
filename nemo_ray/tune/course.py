"""What a sweep knows while it runs: each trial's evaluations, who has to stop, who ended how, which is best.

Its verdicts are a function of the figures alone, in whatever order they come: a sweep that is killed and
resumed ends as one that was not. Calls come from Tune's thread and from the driver's.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable

from nemo_ray.run_dir import RunDir
from nemo_ray.tune.halving import Schedule, Stop
from nemo_ray.tune.sweep_dir import SweepDir, TrialEnd
from nemo_ray.tune.trial import FAILED, FINISHED, STOPPED, Evaluation, Teller

ALIKE = 3
"""So many trials that fail in the same way, before any other was evaluated or has come to an end, end the
sweep."""


class Course:
    """One sweep's state. `closed` says why no trial begins any more; "" while they do."""

    def __init__(
        self, folder: SweepDir, numbers: Iterable[int], metric: str, mode: str, scheduler: str
    ) -> None:
        self.folder, self.metric, self.mode, self.scheduler = folder, metric, mode, scheduler
        self.numbers = tuple(numbers)
        self._places = {number: place for place, number in enumerate(self.numbers)}
        self.closed = ""
        self.evaluations: dict[int, list[Evaluation]] = defaultdict(list)
        self.ends: dict[int, TrialEnd] = {}
        self.running: set[int] = set()
        self._schedule = Schedule(scheduler, len(self.numbers), mode)
        self._stops: dict[int, Stop] = {}
        self._lock = threading.RLock()

    # -- what is told -----------------------------------------------------------------------------

    def restore(self) -> None:
        """Take in what an earlier start of the sweep has left behind."""
        ends = {number: self.folder.read_end(number) for number in self.numbers}
        for number in self.numbers:
            for evaluation in Teller(self.folder.trial(number), self.metric).new():
                self.evaluated(number, evaluation)
        for number, end in ends.items():
            if end is not None:
                self.ended(number, end.status, end.reason)

    def started(self, number: int) -> None:
        """A trial's process begins to work."""
        with self._lock:
            self.running.add(number)

    def evaluated(self, number: int, evaluation: Evaluation) -> None:
        """A trial's figure; one that was told before changes nothing."""
        with self._lock:
            known = self.evaluations[number]
            if evaluation.number != len(known) + 1:
                return
            known.append(evaluation)
            place = self._places[number]
            self._take(self._schedule.report(place, evaluation.number, evaluation.value))

    def ended(self, number: int, status: str, reason: str) -> None:
        """A trial came to its end, failed, or was asked to end."""
        with self._lock:
            self.running.discard(number)
            if status == STOPPED and number not in self._stops:
                return  # by a signal or a budget: it can go on
            self._take(self._schedule.end(self._places[number]))
            self._record(number, status, reason)
            self._close_if_all_fail_alike()

    def close(self, why: str) -> None:
        """No trial begins any more, and those that run save and end."""
        with self._lock:
            self.closed = self.closed or why

    def ask(self) -> None:
        """Ask the trials that have to end to do so: again and again, since a run forgets it as it starts."""
        with self._lock:
            asked = [number for number in self.running if self.closed or number in self._stops]
        for number in asked:
            run = self.folder.trial(number)
            if run.holds_run() and not run.stop_requested():
                run.request_stop()

    # -- what follows from it ---------------------------------------------------------------------

    def left(self) -> list[int]:
        """Trials that have to be trained."""
        with self._lock:
            return [n for n in self.numbers if n not in self.ends and n not in self._stops]

    def value(self, number: int) -> float | None:
        """What a trial is judged by: its last evaluation, or that at which it was stopped."""
        with self._lock:
            stop = self._stops.get(number)
            if stop is not None:
                return stop.value
            known = self.evaluations[number]
            return known[-1].value if known else None

    def best(self) -> int | None:
        """The best of the trials that came to their end; the first of equal ones."""
        with self._lock:
            return best_of(self.ends.values(), self.mode)

    def run(self, number: int) -> RunDir:
        """A trial's run directory."""
        return self.folder.trial(number)

    def _take(self, stops: list[Stop]) -> None:
        for stop in stops:
            number = self.numbers[stop.place]
            self._stops[number] = stop
            if number not in self.running:  # it trained on until this was known
                self._record(number, STOPPED, "")

    def _record(self, number: int, status: str, reason: str) -> None:
        stop, known = self._stops.get(number), self.evaluations[number]
        if stop is not None and status != FAILED:
            at, step = stop.evaluation, known[stop.evaluation - 1].step
            reason = f"{self.metric} {stop.value:.4f} at step {step}; {stop.wanted:.4f} was wanted to go on"
            rung = self._schedule.rung(self._places[number], at)
            end = TrialEnd(number, STOPPED, at, stop.value, step, reason, rung)
        else:
            last = known[-1] if known else Evaluation(0, 0, math.nan)
            value = last.value if known else None
            end = TrialEnd(number, status, last.number, value, last.step, reason)
        self.ends[number] = end
        self.folder.write_end(end)

    def _close_if_all_fail_alike(self) -> None:
        reasons = [end.reason for end in self.ends.values() if end.status == FAILED]
        others = any(self.evaluations[number] for number in self.numbers if number not in self.ends)
        if len(reasons) == len(self.ends) >= ALIKE and len(set(reasons)) == 1 and not others:
            self.close(f"the first {len(reasons)} trials all failed: {reasons[0]}")


def best_of(ends: Iterable[TrialEnd], mode: str) -> int | None:
    """The best of the trials that came to their end, the first of equal ones; None where none did."""
    sign = 1.0 if mode == "min" else -1.0
    found = [
        (sign * end.value, end.number)
        for end in ends
        if end.status == FINISHED and end.value is not None and math.isfinite(end.value)
    ]
    return min(found)[1] if found else None
