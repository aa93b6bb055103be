"""What Optuna proposes: from the space, repeatably, and better than chance once it has learned."""

import math
import statistics

import pytest

from nemo_ray.config.ranges import Formula, Range, Values, parse_parameter
from nemo_ray.tune.space import Point, ends, random
from nemo_ray.tune.suggest import Told, suggest
from nemo_ray.tune.sweep_dir import TrialEnd

SPACE = {
    "lora_r": Values((4, 8, 16, 32)),
    "learning_rate": Range(1e-5, 1e-1, log=True),
    "lora_dropout": Range(0.0, 0.1),
    "warmup_steps": Range(10, 50, step=10),
    "lora_target_modules": Values((["q_proj"], ["q_proj", "v_proj"])),
    "lora_alpha": parse_parameter("2 * lora_r"),
}


def loss(point: Point) -> float:
    """Best at a learning rate of 1e-3 and a rank of 16."""
    return abs(math.log10(point["learning_rate"]) + 3) + abs(math.log2(point["lora_r"]) - 4)


def sweep(count: int, seed: int, mode: str = "min", lag: int = 1) -> list[Told]:
    """Trials one after the other; those of the last `lag - 1` are not known when the next is proposed."""
    sign = 1 if mode == "min" else -1
    told: list[Told] = []
    for number in range(count):
        known = [one if place <= number - lag else Told(one.point, None) for place, one in enumerate(told)]
        point = suggest(SPACE, {}, seed, mode, count, number, known)
        told.append(Told(point, TrialEnd(number, "finished", 3, sign * loss(point), 30)))
    return told


def test_points_lie_in_the_space_and_follow_its_formulas() -> None:
    for point, _ in sweep(25, seed=1):
        assert list(point) == list(SPACE) and point["lora_alpha"] == 2 * point["lora_r"]
        assert point["lora_r"] in (4, 8, 16, 32) and 1e-5 <= point["learning_rate"] <= 1e-1
        assert point["warmup_steps"] in (10, 20, 30, 40, 50) and isinstance(point["warmup_steps"], int)
        assert point["lora_target_modules"] in (["q_proj"], ["q_proj", "v_proj"])


@pytest.mark.parametrize("lag", [1, 3])
def test_the_seed_and_the_results_decide_alone(lag: int) -> None:
    one, other = sweep(15, 3, lag=lag), sweep(15, 3, lag=lag)
    assert one == other and [t.point for t in sweep(15, 4, lag=lag)] != [t.point for t in one]
    before = [told if place <= 14 - lag else Told(told.point, None) for place, told in enumerate(one[:14])]
    assert suggest(SPACE, {}, 3, "min", 15, 14, before) == one[14].point


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_learns(mode: str) -> None:
    """The last ten of thirty are nearer to the best than ten drawn at random."""
    learned = [loss(told.point) for seed in range(5) for told in sweep(30, seed, mode, lag=2)[20:]]
    drawn = [loss(p) for seed in range(5) for p, _ in zip(random(SPACE, {}, seed), range(10), strict=False)]
    assert statistics.mean(learned) < 0.7 * statistics.mean(drawn)


def test_trials_that_were_stopped_or_failed_are_told_too() -> None:
    told = sweep(12, seed=2)
    stopped = [one._replace(end=TrialEnd(n, "stopped", 1, one.end.value, 10)) for n, one in enumerate(told)]  # type: ignore[union-attr]
    failed = [one._replace(end=TrialEnd(n, "failed", 0, None, 0, "why")) for n, one in enumerate(told)]
    points = [str(suggest(SPACE, {}, 2, "min", 30, 12, known)) for known in (told, stopped, failed)]
    assert points[2] != points[0], "nothing is learned from failures"
    no_number = [one._replace(end=TrialEnd(n, "finished", 3, None, 30)) for n, one in enumerate(told)]
    assert str(suggest(SPACE, {}, 2, "min", 30, 12, no_number)) == points[2]


def test_a_small_space_is_gone_through_without_repeating() -> None:
    space = {"lora_r": Values((4, 8, 16)), "use_rslora": Values((True, False))}
    told: list[Told] = []
    for number in range(6):
        point = suggest(space, {}, 0, "min", 6, number, told)
        told.append(Told(point, TrialEnd(number, "finished", 1, float(number), 1)))
    assert len({str(one.point) for one in told}) == 6


def test_the_ends_of_a_space_have_every_value_once() -> None:
    points = list(ends(SPACE, {}))
    for name, found in SPACE.items():
        if isinstance(found, Values):
            assert {str(point[name]) for point in points} == set(map(str, found.values))
        elif not isinstance(found, Formula):
            assert {found.low, found.high} == {point[name] for point in points}
    assert all(point["lora_alpha"] == 2 * point["lora_r"] for point in points)
