"""Who goes on from whom in population-based training (Jaderberg et al., 2017), and with which values.

Trials are compared when all of a generation are there, and what is drawn is a function of the seed, the trial
and the evaluation: not of which trial is faster, of the cluster, or of how often the sweep was killed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ray.config.ranges import Formula, Parameter, Range, Values
from nemo_ray.tune.space import Point, Space, complete, draw, part

REPLACED = 1 / 4
"""The part of a generation, rounded up, that goes on from as many of the best."""
DRAWN_ANEW = 1 / 4
"""How probable it is that a value is drawn from its whole range, and not changed a little."""
FACTORS = (0.8, 1.2)
CHANGEABLE = ("learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio", "weight_decay")
CHANGEABLE += ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lora_dropout")
"""Keys that may have another value from a step on: the weights, the optimizer's states and the order of the
data are what they were."""


def replacements(values: Mapping[int, float], mode: str) -> dict[int, int]:
    """Which of the worst trials goes on from which of the best: the worst from the best, the second worst
    from the second best, as long as that one is better.

    Args: `values`, by the trials' numbers; a figure that is not finite is the worst. `mode`: min or max.
    """
    sign = 1.0 if mode == "min" else -1.0
    judged = {n: sign * value if math.isfinite(value) else math.inf for n, value in values.items()}
    order = sorted(judged, key=lambda number: (judged[number], number))
    count = min(math.ceil(len(order) * REPLACED), len(order) // 2)
    pairs = zip(order[::-1][:count], order, strict=False)
    return {worse: better for worse, better in pairs if judged[better] < judged[worse]}


def explore(
    space: Space, point: Point, fixed: Mapping[str, Any], seed: int, number: int, evaluation: int
) -> Point:
    """Other values for trial `number` after an evaluation, near those of `point`.

    `fixed`: keys that formulas may name. Raises: ValueError naming a key whose formula cannot be computed.
    """
    changed = {}
    for name, parameter in space.items():
        if isinstance(parameter, Formula):
            continue
        first, second = (part(seed, f"{name}, {which} after {evaluation}", number) for which in "ab")
        anew = first < DRAWN_ANEW
        changed[name] = draw(parameter, second) if anew else _near(parameter, point[name], second < 0.5)
    return complete(space, changed, fixed)


def _near(parameter: Parameter, value: Any, lower: bool) -> Any:
    """A list's next value (of numbers, by size), a range's next multiple, or a fifth less or more in it."""
    if isinstance(parameter, Values):
        numbers = all(isinstance(one, int | float) for one in parameter.values)
        return _neighbour(sorted(parameter.values) if numbers else parameter.values, value, lower)
    assert isinstance(parameter, Range)
    if parameter.step is not None:
        multiples = tuple(parameter.multiple(count) for count in parameter.multiples)
        return _neighbour(multiples, value, lower)
    return min(max(value * FACTORS[not lower], parameter.low), parameter.high)


def _neighbour(values: Sequence[Any], value: Any, lower: bool) -> Any:
    place = values.index(value) + (-1 if lower else 1)
    return values[min(max(place, 0), len(values) - 1)]
