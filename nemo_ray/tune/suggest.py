"""Points that learn from results: what Optuna's TPE (Bergstra et al., 2011) proposes, repeatably.

A proposal is a function of the seed, its number and what the trials before it came to: each is made by a
sampler of its own, that is told of nothing else. So a sweep that is resumed asks nothing that it knew before.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from nemo_ray.config.ranges import Formula, Range, Values
from nemo_ray.tune.space import Point, Space, complete, random
from nemo_ray.tune.sweep_dir import TrialEnd
from nemo_ray.tune.trial import FINISHED, STOPPED

_MOST_DRAWN_AT_RANDOM = 10
"""Trials before the sampler has enough to learn from; a third of a small sweep's."""
_ASKED_FOR_ANOTHER = 50
_STATES = {FINISHED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED}


class Told(NamedTuple):
    """An earlier trial; `end` None where it is not known yet how it ended."""

    point: Point
    end: TrialEnd | None


def suggest(
    space: Space,
    fixed: Mapping[str, Any],
    seed: int,
    mode: str,
    num_trials: int,
    number: int,
    told: Sequence[Told],
) -> Point:
    """The point of trial `number`, distinct from those before it as long as there are such.

    told: the trials before it, those without a point left out. Raises: ValueError naming a key whose formula
    cannot be computed there.
    """
    drawn = {name: found for name, found in space.items() if not isinstance(found, Formula)}
    distributions = {name: _distribution(found) for name, found in drawn.items()}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        seed=(seed * 1_000_003 + number) % 2**32,
        n_startup_trials=min(_MOST_DRAWN_AT_RANDOM, max(1, num_trials // 3)),
        constant_liar=True,  # not beside a point that is being tried
    )
    direction = "minimize" if mode == "min" else "maximize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    for one in told:
        study.add_trial(_as_trial(one, drawn, distributions))
    seen = {_text(one.point, drawn) for one in told}
    for _ in range(_ASKED_FOR_ANOTHER):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            params = study.ask(distributions).params
        point = {name: _value(found, params[name]) for name, found in drawn.items()}
        if _text(point, drawn) not in seen:
            return complete(space, point, fixed)
    new = (point for point in random(space, fixed, seed) if _text(point, drawn) not in seen)
    return next(new, complete(space, point, fixed))


def _text(point: Point, drawn: Mapping[str, Any]) -> str:
    return json.dumps([point[name] for name in drawn])


def _as_trial(
    one: Told, drawn: Mapping[str, Values | Range], distributions: Mapping[str, BaseDistribution]
) -> optuna.trial.FrozenTrial:
    end = one.end
    state = TrialState.RUNNING if end is None else _STATES.get(end.status, TrialState.FAIL)
    judged = end is not None and end.value is not None
    if state in _STATES.values() and not judged:  # its figure was no number
        state = TrialState.FAIL
    return create_trial(
        state=state,
        value=end.value if state == TrialState.COMPLETE and end is not None else None,
        intermediate_values={end.evaluation: end.value} if judged and end is not None else None,
        params={name: _param(found, one.point[name]) for name, found in drawn.items()},
        distributions=dict(distributions),
    )


def _distribution(parameter: Values | Range) -> BaseDistribution:
    if isinstance(parameter, Values):
        places = range(len(parameter.values))
        return IntDistribution(0, places[-1]) if _ordered(parameter) else CategoricalDistribution(places)
    if parameter.step is not None:
        return IntDistribution(parameter.multiples[0], parameter.multiples[-1])
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _ordered(parameter: Values) -> bool:
    """Numbers one above the other: neighbours are then alike."""
    values = parameter.values
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and all(low < high for low, high in zip(values, values[1:], strict=False))


def _param(parameter: Values | Range, value: Any) -> Any:
    """What Optuna calls a value."""
    if isinstance(parameter, Values):
        return parameter.values.index(value)
    return value if parameter.step is None else round(value / parameter.step)


def _value(parameter: Values | Range, param: Any) -> Any:
    if isinstance(parameter, Values):
        return parameter.values[param]
    return param if parameter.step is None else parameter.multiple(param)
