"""The points of a sweep: complete, distinct, and the same whatever else is asked for."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest

from nemo_ray.config.ranges import Formula, Range, Values, parse_parameter
from nemo_ray.tune.space import Space, grid, random, size

SPACE = {
    "lora_r": [4, 8, 16],
    "lora_alpha": "2 * lora_r",
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
    "warmup_steps": {"quniform": [10, 30, 10]},
    "lora_target_modules": [["q_proj"], ["q_proj", "v_proj"]],
}


def parsed(space: dict[str, Any]) -> Space:
    return {name: parse_parameter(value) for name, value in space.items()}


def take(count: int, space: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(random(parsed(space), {}, seed), count))


# -- what can be written ---------------------------------------------------------------------------


def test_each_form() -> None:
    found = parsed(SPACE)
    assert found["lora_r"] == Values((4, 8, 16)) == parse_parameter({"grid": [4, 8, 16]})
    assert found["learning_rate"] == Range(1e-5, 1e-2, log=True)
    assert found["lora_alpha"] == Formula("2 * lora_r", frozenset({"lora_r"}))


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([], "the list is empty"),
        ([8, 16, 8], "holds a value twice"),
        (3, "give a list of values"),
        ({}, "give a list of values"),
        ({"uniform": [0, 1], "choice": [1]}, "give a list of values"),
        ({"normal": [0, 1]}, "normal is no kind of range"),
        ({"uniform": [0, 1, 2]}, "uniform wants 2 numbers"),
        ({"uniform": ["a", 1]}, "uniform wants 2 numbers"),
        ({"uniform": [True, 2]}, "uniform wants 2 numbers"),
        ({"quniform": [1, 2]}, "quniform wants 3 numbers"),
        ({"quniform": [1.1, 1.9, 1]}, "no multiple of the third number"),
        ({"quniform": [1, 2, 0]}, "no multiple of the third number"),
        ({"uniform": [2, 1]}, "the first number must be the smaller one"),
        ({"loguniform": [0, 1]}, "both numbers must be above 0"),
        ({"choice": 3}, "choice wants a list"),
        ("2 *", "is no formula"),
        ("2 * 3", "names no other parameter"),
        ("lora_r.real", "formulas are numbers, keys"),
        ("__import__('os').getcwd()", "formulas are numbers, keys"),
        ("[lora_r]", "formulas are numbers, keys"),
        ("lora_r if lora_r else 2", "formulas are numbers, keys"),
    ],
)
def test_what_cannot_be_a_parameter(value: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse_parameter(value)


@pytest.mark.parametrize(
    ("formula", "known", "value"),
    [
        ("2 * lora_r", {"lora_r": 8}, 16),
        ("lora_r // 2 + 1", {"lora_r": 8}, 5),
        ("sqrt(lora_r) * -a", {"lora_r": 16, "a": 0.5}, -2.0),
        ("max(8, min(lora_r, 64))", {"lora_r": 128}, 64),
        ("round(1e-3 / 2 ** a, 6)", {"a": 1}, 5e-4),
    ],
)
def test_formulas(formula: str, known: dict[str, Any], value: float) -> None:
    found = parse_parameter(formula)
    assert isinstance(found, Formula) and found.value(known) == value


# -- points ----------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order() -> None:
    space = parsed({"lora_r": [4, 8], "lora_alpha": "2 * lora_r", "optimizer": ["a", "b", "c"]})
    points = list(grid(space, {}))
    assert len(points) == size(space) == 6
    assert points[1] == {"lora_r": 4, "lora_alpha": 8, "optimizer": "b"}
    assert [list(point) for point in points] == [list(space)] * 6
    assert {(point["lora_r"], point["lora_alpha"]) for point in points} == {(4, 8), (8, 16)}


def test_random_points_lie_in_the_space() -> None:
    points = take(500, SPACE)
    assert len(points) == 500
    for point in points:
        assert list(point) == list(SPACE)
        assert point["lora_r"] in SPACE["lora_r"] and point["lora_alpha"] == 2 * point["lora_r"]
        assert 1e-5 <= point["learning_rate"] <= 1e-2
        assert point["warmup_steps"] in (10, 20, 30) and isinstance(point["warmup_steps"], int)
    for name in ("lora_r", "warmup_steps"):  # each is drawn about as often
        counts = Counter(point[name] for point in points)
        assert len(counts) == 3 and min(counts.values()) > 120
    logs = sorted(math.log10(point["learning_rate"]) for point in points)
    assert abs(logs[250] + 3.5) < 0.2 and logs[0] < -4.9 and logs[-1] > -2.1


def test_more_trials_change_none_and_another_seed_changes_all() -> None:
    assert take(20, SPACE)[:7] == take(7, SPACE)
    assert not any(one == other for one, other in zip(take(20, SPACE), take(20, SPACE, seed=1), strict=True))


def test_random_points_are_distinct_and_end_with_the_space() -> None:
    small = {"lora_r": [4, 8, 16], "warmup_steps": {"quniform": [0, 3, 1]}}
    points = take(100, small)
    assert len(points) == size(parsed(small)) == 12
    assert len({tuple(point.values()) for point in points}) == 12


def test_formulas_may_name_formulas_and_keys_that_are_not_swept() -> None:
    space = parsed({"a": "b + 1", "b": "c * micro", "c": [1, 2]})
    assert list(grid(space, {"micro": 10})) == [{"a": 11, "b": 10, "c": 1}, {"a": 21, "b": 20, "c": 2}]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"a": "b", "b": "a", "c": [1]}, "a: the formulas refer to each other in a circle"),
        ({"a": "2 * d", "c": [1]}, r"a: 2 \* d names d, which is no key"),
        ({"a": "1 / c", "c": [0]}, "a: 1 / c cannot be computed: division by zero"),
        ({"a": "2 * c", "c": ["x"]}, r"a: 2 \* c cannot be computed: c is no number"),
    ],
)
def test_formulas_that_cannot_be_computed(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(grid(parsed(space), {}))
