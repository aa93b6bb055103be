"""Who goes on from whom, and with which values: a function of figures and the seed."""

import math
from typing import Any

import pytest

from nemo_ray.config.ranges import parse_parameter
from nemo_ray.tune.population import CHANGEABLE, explore, replacements
from nemo_ray.tune.space import Space

DRAWS = 400


@pytest.mark.parametrize(
    ("values", "mode", "wanted"),
    [
        ([3.0, 1.0, 2.0, 4.0, 0.5, 2.5, 2.6, 2.7], "min", {3: 4, 0: 1}),
        ([3.0, 1.0, 2.0, 4.0], "max", {1: 3}),
        ([1.0, 2.0, 3.0], "min", {2: 0}),
        ([1.0, 2.0], "min", {1: 0}),
        ([1.0], "min", {}),
        ([2.0, 2.0, 2.0, 2.0], "min", {}),
        ([1.0, math.nan, 2.0, 3.0], "max", {1: 3}),
        ([math.nan, math.nan], "min", {}),
        ([math.inf, 1.0, 2.0, 3.0], "max", {0: 3}),
    ],
)
def test_the_worst_quarter_goes_on_from_the_best(
    values: list[float], mode: str, wanted: dict[int, int]
) -> None:
    assert replacements(dict(enumerate(values)), mode) == wanted


def test_nobody_is_both_a_source_and_replaced() -> None:
    for count in range(2, 20):
        found = replacements({number: float(number) for number in range(count)}, "min")
        assert len(found) == max(1, math.ceil(count / 4)) if count > 1 else not found
        assert not found.keys() & set(found.values())


def values_of(parameter: Any, value: Any, **others: Any) -> list[Any]:
    space: Space = {"key": parse_parameter(parameter), **{k: parse_parameter(v) for k, v in others.items()}}
    begun = {"key": value, **dict.fromkeys(others)}
    return [explore(space, begun, {}, 7, number, 1)["key"] for number in range(DRAWS)]


def test_a_number_is_changed_by_a_fifth_or_drawn_anew() -> None:
    found = values_of({"loguniform": [1e-5, 1e-1]}, 1e-3)
    near = [value for value in found if value in (0.8 * 1e-3, 1.2 * 1e-3)]
    assert 0.65 < len(near) / DRAWS < 0.85 and len(set(near)) == 2
    others = [value for value in found if value not in near]
    assert len(set(others)) == len(others) and all(1e-5 <= value <= 1e-1 for value in others)
    assert max(values_of({"uniform": [0.0, 0.1]}, 0.1)) == 0.1, "within the range"


def test_of_a_list_the_next_value_is_taken_and_of_a_range_with_a_step_the_next_multiple() -> None:
    found = values_of(["a", "b", "c", "d", "e"], "c")
    assert found.count("b") + found.count("d") > 0.7 * DRAWS and min(found.count("b"), found.count("d")) > 90
    sizes = values_of([0.0, 0.1, 0.01], 0.01)
    assert sizes.count(0.0) + sizes.count(0.1) > 0.7 * DRAWS, "numbers are next to each other by size"
    assert {"a", "b"} <= set(values_of(["a", "b"], "a"))
    steps = values_of({"quniform": [10, 100, 10]}, 50)
    assert steps.count(40) + steps.count(60) > 0.7 * DRAWS and all(step % 10 == 0 for step in steps)


def test_formulas_follow_and_draws_are_repeatable() -> None:
    space = {
        "learning_rate": parse_parameter({"loguniform": [1e-5, 1e-1]}),
        "weight_decay": parse_parameter("10 * learning_rate"),
    }
    point = {"learning_rate": 1e-3, "weight_decay": 1e-2}
    found = [explore(space, point, {}, 1, number, 2) for number in range(9)]
    assert all(one["weight_decay"] == 10 * one["learning_rate"] for one in found)
    assert found == [explore(space, point, {}, 1, number, 2) for number in range(9)]
    assert found != [explore(space, point, {}, 2, number, 2) for number in range(9)]
    assert found != [explore(space, point, {}, 1, number, 3) for number in range(9)]


def test_what_may_change_are_keys_of_training_that_exist() -> None:
    from nemo_ray.tune.load import SWEPT

    assert set(CHANGEABLE) <= SWEPT
