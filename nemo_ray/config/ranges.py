"""What a swept key may be: a list of values, a range to draw from, or a formula over other keys.

    lora_r: [8, 16, 32]                      one of these
    learning_rate: {loguniform: [1e-5, 1e-3]}
    lora_dropout: {uniform: [0, 0.1]}
    warmup_steps: {quniform: [10, 100, 10]}  multiples of the third number
    lora_alpha: 2 * lora_r                   computed from the trial's other values

How values are drawn from them is tune/space.py's.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LISTS = ("grid", "choice")
RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3}
"""Kind to the number of its arguments."""
_FORMS = (
    "a list of values, {uniform: [low, high]}, {loguniform: [low, high]}, {quniform: [low, high, step]}, or "
    "a formula such as 2 * lora_r"
)
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "sqrt": math.sqrt}


@dataclass(frozen=True)
class Values:
    """One of these."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`: evenly, evenly in the logarithm, or a multiple of `step`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def at(self, part: float) -> float | int:
        """The value at 0 <= part < 1 of the range."""
        if self.log:
            return math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))
        if self.step is None:
            return self.low + part * (self.high - self.low)
        multiples = self.multiples
        return self.multiple(multiples[math.floor(part * len(multiples))])

    @property
    def multiples(self) -> range:
        """Of `step`, those that lie in the range. Only where there is a step."""
        assert self.step is not None
        return range(math.ceil(self.low / self.step), math.floor(self.high / self.step) + 1)

    def multiple(self, count: int) -> float | int:
        """`count` times `step`; whole where all of the range's numbers are."""
        assert self.step is not None
        whole = all(float(number).is_integer() for number in (self.low, self.high, self.step))
        value = count * self.step
        return round(value) if whole else round(value, 12)


@dataclass(frozen=True)
class Formula:
    """A number computed from the trial's other values, and from keys that are not swept."""

    text: str
    names: frozenset[str]

    def value(self, known: Mapping[str, Any]) -> Any:
        """Raises: ValueError where it cannot be computed, ArithmeticError."""
        return _evaluate(ast.parse(self.text, mode="eval").body, known)


Parameter = Values | Range | Formula


def parse_parameter(value: Any) -> Parameter:
    """Understand one entry of `tune.parameters`. Raises: ValueError with what to give instead."""
    if isinstance(value, str):
        return _formula(value)
    if isinstance(value, list):
        return _values(value)
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"give {_FORMS}")
    ((kind, arguments),) = value.items()
    if kind in LISTS:
        if not isinstance(arguments, list):
            raise ValueError(f"{kind} wants a list of values")
        return _values(arguments)
    if kind not in RANGES:
        raise ValueError(f"{kind} is no kind of range; give {_FORMS}")
    return _range(kind, arguments)


def _values(values: list[Any]) -> Values:
    if not values:
        raise ValueError("the list is empty; give values")
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError("the list holds a value twice; keep one")
    return Values(tuple(values))


def _range(kind: str, arguments: Any) -> Range:
    count = RANGES[kind]
    numbers = arguments if isinstance(arguments, list) else []
    if len(numbers) != count or not all(_is_number(number) for number in numbers):
        raise ValueError(
            f"{kind} wants {count} numbers: {'[low, high, step]' if count == 3 else '[low, high]'}"
        )
    low, high = numbers[:2]
    if low >= high:
        raise ValueError(f"{kind}: the first number must be the smaller one")
    if kind == "loguniform" and low <= 0:
        raise ValueError("loguniform: both numbers must be above 0")
    if kind != "quniform":
        return Range(low, high, log=kind == "loguniform")
    step = numbers[2]
    if step <= 0 or math.ceil(low / step) > math.floor(high / step):
        raise ValueError("quniform: no multiple of the third number lies between the other two")
    return Range(low, high, step=step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _formula(text: str) -> Formula:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(f"is no formula; give {_FORMS}") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - _FUNCTIONS.keys()
    _evaluate(tree, dict.fromkeys(names, 1))  # says what is not allowed
    if not names:
        raise ValueError(f"names no other parameter; give {_FORMS}")
    return Formula(text, frozenset(names))


def _evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            if not _is_number(known[name]):
                raise ValueError(f"{name} is no number, so nothing is computed from it")
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, known), _evaluate(right, known))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, known)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(argument, known) for argument in arguments))
    raise ValueError("formulas are numbers, keys, + - * / // **, min, max, round and sqrt")
