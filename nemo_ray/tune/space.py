"""Which values each trial of a sweep tries: a pure function of the space, the search and the seed.

Random trials are the distinct ones of a sequence of draws that the seed alone determines: more trials, or a
part of them on another cluster, change none of them.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ray.config.ranges import Formula, Parameter, Range, Values
from nemo_ray.hashing import hashes

Space = Mapping[str, Parameter]
Point = dict[str, Any]
"""Key to value, formulas included."""
_DRAWS_PER_TRIAL = 1000


def size(space: Space) -> float:
    """How many points there are; inf where a range is continuous."""
    total = 1.0
    for parameter in space.values():
        if isinstance(parameter, Values):
            total *= len(parameter.values)
        elif isinstance(parameter, Range):
            total *= _steps(parameter)
    return total


def _steps(parameter: Range) -> float:
    return math.inf if parameter.step is None else len(parameter.multiples)


def grid(space: Space, fixed: Mapping[str, Any]) -> Iterator[Point]:
    """Every combination of lists; the last one changes fastest. `fixed`: keys that formulas may name."""
    lists = {name: found.values for name, found in space.items() if isinstance(found, Values)}
    for combination in itertools.product(*lists.values()):
        yield complete(space, dict(zip(lists, combination, strict=True)), fixed)


def random(space: Space, fixed: Mapping[str, Any], seed: int) -> Iterator[Point]:
    """Distinct points, drawn at random; ends where there are no more, or they are too hard to find."""
    seen: set[str] = set()
    misses, number = 0, 0
    while misses < _DRAWS_PER_TRIAL and len(seen) < size(space):
        point = {
            name: draw(found, part(seed, name, number))
            for name, found in space.items()
            if not isinstance(found, Formula)
        }
        number += 1
        text = json.dumps(point, sort_keys=True)
        if text in seen:
            misses += 1
            continue
        seen.add(text)
        misses = 0
        yield complete(space, point, fixed)


def ends(space: Space, fixed: Mapping[str, Any]) -> Iterator[Point]:
    """Points at which each parameter once has each of its values, or its lowest and its highest."""
    choices = {name: _ends(found) for name, found in space.items() if not isinstance(found, Formula)}
    first = {name: values[0] for name, values in choices.items()}
    yield complete(space, first, fixed)
    for name, values in choices.items():
        for value in values[1:]:
            yield complete(space, {**first, name: value}, fixed)


def _ends(parameter: Values | Range) -> tuple[Any, ...]:
    if isinstance(parameter, Values):
        return parameter.values
    if parameter.step is None:
        return parameter.low, parameter.high
    return parameter.multiple(parameter.multiples[0]), parameter.multiple(parameter.multiples[-1])


def complete(space: Space, point: Point, fixed: Mapping[str, Any]) -> Point:
    """The point with its formulas, in the order of the space. Raises: ValueError naming the key."""
    known = {**fixed, **point}
    formulas = {name: found for name, found in space.items() if isinstance(found, Formula)}
    while formulas:
        ready = [name for name, formula in formulas.items() if not formula.names & formulas.keys()]
        if not ready:
            raise ValueError(f"{next(iter(formulas))}: the formulas refer to each other in a circle")
        for name in ready:
            known[name] = _computed(name, formulas.pop(name), known)
    return {name: known[name] for name in space}


def _computed(name: str, formula: Formula, known: Mapping[str, Any]) -> Any:
    try:
        return formula.value(known)
    except KeyError as error:
        raise ValueError(f"{name}: {formula.text} names {error.args[0]}, which is no key") from None
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{name}: {formula.text} cannot be computed: {error}") from None


def draw(parameter: Values | Range, at: float) -> Any:
    """The value at 0 <= `at` < 1 of a parameter."""
    if isinstance(parameter, Values):
        return parameter.values[int(at * len(parameter.values))]
    return parameter.at(at)


def part(seed: int, name: str, number: int) -> float:
    """Uniform in [0, 1): a pure function of its arguments."""
    drawn = int(hashes(json.dumps(["sweep", seed, name]).encode(), number, number + 1)[0])
    return (drawn >> 11) / 2**53
