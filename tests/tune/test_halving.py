"""Which trials are stopped is a function of their figures, whatever the order in which these come."""

import math
import random
from collections.abc import Sequence

import pytest

from nemo_ray.tune.halving import Halving, Schedule, Stop, rungs

Curves = Sequence[Sequence[float]]


def play(
    curves: Curves, at: Sequence[int], concurrent: int, draw: random.Random, mode: str = "min"
) -> list[Stop]:
    """A sweep of trials that start by number, so many at a time, each as fast as it likes."""
    return play_with(Halving(at, len(curves), mode), curves, concurrent, draw)


def play_with(
    halving: Halving | Schedule, curves: Curves, concurrent: int, draw: random.Random
) -> list[Stop]:
    running: dict[int, int] = {}
    waiting, stops = list(range(len(curves))), []
    while waiting or running:
        while waiting and len(running) < concurrent:
            running[waiting.pop(0)] = 0
        number = draw.choice(sorted(running))
        if running[number] == len(curves[number]):
            del running[number]
            new = halving.end(number)
        else:
            running[number] += 1
            new = halving.report(number, running[number], curves[number][running[number] - 1])
        for stop in new:
            stops.append(stop)
            if running.pop(stop.place, None) is not None:
                new = halving.end(stop.place)
                assert not new
    return sorted(stops, key=lambda stop: stop.place)


def curves(draw: random.Random, count: int, length: int) -> list[list[float]]:
    made = [[draw.random() for _ in range(length)] for _ in range(count)]
    for curve in draw.sample(made, k=count // 4):
        del curve[draw.randrange(length) :]  # it failed there
    return made


@pytest.mark.parametrize("seed", range(30))
def test_the_order_of_reports_changes_nothing(seed: int) -> None:
    draw = random.Random(seed)
    given = curves(draw, draw.randrange(2, 14), 9)
    at = rungs(draw.choice([1, 2]), 9)
    wanted = play(given, at, 1, draw)
    assert len({stop.place for stop in wanted}) == len(wanted)
    for concurrent in (1, 2, 3, 5, 20):
        for _ in range(5):
            assert play(given, at, concurrent, draw) == wanted


def test_rungs() -> None:
    assert rungs(1, 10) == (1, 3, 9) and rungs(2, 19, eta=3) == (2, 6, 18) and rungs(1, 1) == ()


def test_the_best_third_goes_on() -> None:
    # One after the other, worse each time: of the trials up to itself each is the worst.
    stops = play([[value] * 4 for value in (1.0, 2.0, 3.0, 4.0)], (1, 3), 1, random.Random(0))
    assert [(stop.place, stop.evaluation) for stop in stops] == [(1, 1), (2, 1), (3, 1)]
    assert (stops[0].value, stops[0].wanted) == (2.0, 1.0) and stops[2].wanted == 2.0
    # Better each time: nobody is stopped.
    assert not play([[value] * 4 for value in (4.0, 3.0, 2.0, 1.0)], (1, 3), 1, random.Random(0))
    # The other way round with the other mode.
    assert len(play([[value] * 4 for value in (4.0, 3.0, 2.0, 1.0)], (1, 3), 1, random.Random(0), "max")) == 3


def test_a_figure_that_is_no_number_is_the_worst() -> None:
    halving = Halving((1,), 3, "max")
    assert halving.report(0, 1, 0.5) == []
    (stop,) = halving.report(1, 1, math.nan)
    assert stop.place == 1 and halving.report(2, 1, 0.6) == []


def test_who_comes_early_waits_and_is_stopped_later() -> None:
    halving = Halving((1, 3), 2, "min")
    assert [halving.report(1, evaluation, 9.0) for evaluation in (1, 2, 3)] == [[], [], []]
    assert halving.end(1) == []
    assert halving.report(0, 1, 1.0) == [Stop(1, 1, 9.0, 1.0)]
    assert halving.report(0, 3, 5.0) == []  # alone at its rung: the other one counts no more


def test_reports_again_after_a_resume_change_nothing() -> None:
    halving = Halving((1, 3), 3, "min")
    halving.report(0, 1, 1.0)
    assert len(halving.report(1, 1, 2.0)) == 1
    for number, value in ((0, 1.0), (1, 2.0), (1, 0.1)):
        assert halving.report(number, 1, value) == []


@pytest.mark.parametrize("name", ["none", "asha", "hyperband", "median"])
@pytest.mark.parametrize("seed", range(8))
def test_no_scheduler_depends_on_the_order_of_reports(name: str, seed: int) -> None:
    draw = random.Random(seed)
    given = curves(draw, draw.randrange(8, 24), 12)

    def stops(concurrent: int) -> list[Stop]:
        return play_with(Schedule(name, len(given), "min"), given, concurrent, draw)

    wanted = stops(1)
    assert bool(wanted) == (name != "none")
    for concurrent in (2, 4, 24):
        assert stops(concurrent) == wanted


def test_brackets_of_hyperband_begin_later_and_compare_their_own() -> None:
    worse = [[float(number)] * 10 for number in range(16)]  # each worse than all before it
    schedule = Schedule("hyperband", 16, "min")
    stops = {stop.place: stop for stop in play_with(schedule, worse, 4, random.Random(0))}
    firsts = {0: None, 2: None, 4: None}  # of each bracket
    assert stops.keys() == set(range(16)) - firsts.keys()
    later, latest = {2, 6, 10, 14}, {4, 12}
    for place, stop in stops.items():
        assert stop.evaluation == (9 if place in latest else 3 if place in later else 1)
        assert schedule.rung(place, stop.evaluation) == 0
    assert stops[6].wanted == 2.0 and stops[12].wanted == 4.0


def test_the_better_half_goes_on_by_the_median() -> None:
    schedule = Schedule("median", 6, "min")
    given = [[5.0, 5.0, 1.0], [3.0, 3.0, 3.0], [9.0, 9.0, 2.0], [4.0, 6.0, 0.0], [8.0], [2.0, 1.0, 2.5]]
    stops = play_with(schedule, given, 3, random.Random(0))
    assert [(stop.place, stop.evaluation, stop.wanted) for stop in stops] == [
        (3, 2, 5.0),
        (4, 1, 5.0),
        (5, 3, 2.0),
    ]
    assert schedule.rung(3, 2) == 1
