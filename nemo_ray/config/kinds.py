"""The kinds of value that keys take, each with its words, for the reference and for error messages."""

import json
import os
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Strict

MOST_TOKENS = 2**31 - 1
"""Of a forward pass: where documents begin in it is int32 on a GPU."""


@dataclass(frozen=True)
class Kind:
    """Carried in `Annotated[...]`: the values a type allows, in words."""

    text: str


def _as_list(value: Any) -> Any:
    """A single text where a list is expected is a list of one."""
    return [value] if isinstance(value, str) else value


# Other names that the two modules have, in PEFT's files or elsewhere.
_MODULE_NAMES = {
    "embed_tokens": "embeddings",
    "embedding": "embeddings",
    "model.embeddings": "embeddings",
    "backbone.embeddings": "embeddings",
    "backbone.embedding": "embeddings",
}


def _module_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_MODULE_NAMES.get(name, name) for name in names))


def _rows_or_fraction(value: float) -> float:
    if value < 0 or (value >= 1 and value != int(value)):
        raise ValueError("out of range")
    return int(value) if value >= 1 else value


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As another process reads them: a date of YAML becomes its text."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return result


def _metric(value: str) -> str:
    """As in transformers, `loss` is short for `eval_loss`."""
    return value if value.startswith("eval_") else f"eval_{value}"


def _fewest_and_most(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError("the first is the larger one")
    return value


Bool = Annotated[bool, Strict(), Kind("true or false")]
Text = Annotated[str, Field(min_length=1), Kind("text")]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser), Kind("a path")]
Metric = Annotated[Text, AfterValidator(_metric), Kind("eval_loss or eval_loss/NAME")]
TextList = Annotated[tuple[Text, ...], BeforeValidator(_as_list), Kind("a list of text")]
ModuleList = Annotated[TextList, AfterValidator(_module_names), Kind("a list of text")]
PathList = Annotated[tuple[PathText, ...], BeforeValidator(_as_list), Kind("a list of paths")]
PositiveInt = Annotated[int, Strict(), Field(gt=0), Kind("a whole number above 0")]
NonNegativeInt = Annotated[int, Strict(), Field(ge=0), Kind("a whole number, 0 or more")]
FailureCount = Annotated[int, Strict(), Field(ge=-1), Kind("a whole number, 0 or more, or -1 for no limit")]
Workers = Annotated[
    PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_fewest_and_most)],
    Kind("a whole number above 0, or [the fewest, the most]"),
]
PackLength = Annotated[
    int, Strict(), Field(ge=2, le=MOST_TOKENS), Kind(f"a whole number from 2 to {MOST_TOKENS}")
]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32), Kind("a whole number from 0 to 4294967295")]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), Kind("a finite number above 0")]
Epochs = Annotated[float, Strict(), Field(gt=0, le=1e6), Kind("a number above 0, up to 1000000")]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), Kind("a finite number, 0 or more")]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1), Kind("a number from 0 to below 1")]
Ratio = Annotated[float, Strict(), Field(ge=0, le=1), Kind("a number from 0 to 1")]
Number = Annotated[int, Strict()] | Annotated[float, Strict(), Field(allow_inf_nan=False)]
HeldOut = Annotated[
    Number, AfterValidator(_rows_or_fraction), Kind("a fraction below 1, or a whole number of rows")
]
Resources = Annotated[dict[Text, NonNegative], Kind("a map from resource name to a finite number, 0 or more")]
RankPattern = Annotated[dict[Text, PositiveInt], Kind("a map from text to a whole number above 0")]
AlphaPattern = Annotated[dict[Text, Positive], Kind("a map from text to a finite number above 0")]
Mapping = Annotated[dict[Text, Text], Kind("a map from text to text")]
RolesMap = Annotated[dict[Text, TextList], Kind("a map from a role to a list of its names")]
Arguments = Annotated[dict[Text, Any], AfterValidator(_as_json), Kind("a map from text to values")]


def describe(hint: Any) -> str:
    """The values that a type hint of the schema allows, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        texts = [item.text for item in args[1:] if isinstance(item, Kind)]
        return texts[0] if texts else describe(args[0])
    if origin is Literal:
        return _either([str(value) for value in args])
    assert origin in (Union, UnionType), f"no words for {hint!r}"
    return _either([describe(item) for item in args if item is not NoneType])


def _either(words: list[str]) -> str:
    flat = [word for text in words for word in text.split(" or ")] if len(words) > 1 else words
    return " or ".join([", ".join(flat[:-1]), flat[-1]]) if len(flat) > 1 else flat[0]


def kinds_of(section: type[BaseModel]) -> dict[str, str]:
    """Key -> the values it takes, for every key of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {name: describe(hints[name]) for name in section.model_fields}
