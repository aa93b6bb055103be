"""From a YAML file and `key=value` overrides to a checked, frozen configuration.

Owns the order: the file, one spelling for each key, overrides, absent keys out, axolotl's own keys out,
types, rules between keys, paths. Imports no torch, transformers or Ray: a wrong key is answered at once.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from nemo_ray.config.checks import path_errors, rule_errors, rule_notices, support_errors
from nemo_ray.config.dataset_folds import name_tokenized
from nemo_ray.config.kinds import kinds_of
from nemo_ray.config.nearest import dotted, unknown_key
from nemo_ray.config.overrides import apply_override
from nemo_ray.config.schema import Config, DatasetSpec, RaySection, Section
from nemo_ray.config.translate import (
    DATASET_KEYS,
    Raw,
    dataset_entries,
    drop_absent,
    keys_that_swallowed_a_value,
    rename_keys,
    show,
    translate,
)
from nemo_ray.config.yaml_file import read_yaml
from nemo_ray.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that can run, and one line for each thing that runs otherwise than the YAML says."""

    config: Config
    notices: tuple[str, ...]


def load_config(
    path: str, overrides: Sequence[str] = (), *, check_paths: bool = True, check_support: bool = True
) -> LoadedConfig:
    """Read, check and freeze the configuration in the YAML file `path`, changed by `key=value` overrides.

    Keys and types are reported first, all of them, one line each; then what contradicts itself or is not
    supported yet; then paths that do not exist.

    check_paths: False leaves out whether named files and folders exist (to check a file away from its data).
    check_support: False leaves out what this version cannot do yet (to read a configuration for a later one).
    Raises ConfigError with one line per problem.
    """
    return check_raw(read_raw(path, overrides), check_paths=check_paths, check_support=check_support)


def read_raw(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Raw:
    """The keys of a file or mapping, each by its one spelling, changed by overrides. Raises ConfigError."""
    raw = read_yaml(source) if isinstance(source, str) else copy.deepcopy(dict(source))
    errors = rename_keys(raw)
    for override in overrides:
        errors += apply_override(raw, override)
    # Again, for whole sections that overrides have set.
    _raise([*errors, *rename_keys(raw), *keys_that_swallowed_a_value(raw)])
    return raw


def check_raw(raw: Raw, *, check_paths: bool = True, check_support: bool = True) -> LoadedConfig:
    """The rest of `load_config`, on keys that it may change. Raises ConfigError."""
    adapter_named = "adapter" in raw
    name_tokenized([entry for _, _, entry in dataset_entries(raw)])
    raw = drop_absent(raw)
    found = translate(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join([*found.errors, *_lines(error)])) from None
    _raise(found.errors)
    later = [*found.refusals, *support_errors(config)] if check_support else []
    _raise([*rule_errors(config, adapter_named), *later])
    if check_paths:
        _raise(path_errors(config))
    return LoadedConfig(config, (*found.notices, *rule_notices(config)))


def problem_lines(error: ValidationError, section: type[Section], name: str) -> list[str]:
    """One line for each key of the section `name` that pydantic found wrong."""
    lines = {}
    for item in error.errors():
        key = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            close = get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
            advice = (
                f"did you mean {name}.{close[0]}?" if close else "remove it (docs/config.md lists the keys)"
            )
            lines[key] = f"{name}.{key}: {show(item['input'])}: unknown key; {advice}"
        elif item["type"] == "missing":
            lines[key] = f"{name}.{key}: missing; give {kinds_of(section)[key]}"
        else:
            value = item["input"] if len(item["loc"]) == 1 else item["loc"][-1]
            lines[key] = f"{name}.{key}: {show(value)} is not valid; give {kinds_of(section)[key]}"
    return list(lines.values())


def _raise(lines: list[str]) -> None:
    if lines:
        raise ConfigError("\n".join(lines))


def _lines(error: ValidationError) -> list[str]:
    problems = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    places = [_place(item["loc"]) for item in problems]
    lines: dict[tuple[str | int, ...], str] = {}
    for place, item in zip(places, problems, strict=True):
        inner = any(len(other) > len(place) and other[: len(place)] == place for other in places)
        if place not in lines and not inner:
            lines[place] = _line(place, item["type"], item["input"])
    return list(lines.values())


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The key that an error belongs to, without the members of a union that pydantic appends."""
    if loc[0] in DATASET_KEYS:
        return loc[:3]
    return loc[:2] if loc[0] == "ray" else loc[:1]


def _line(place: tuple[str | int, ...], kind: str, value: Any) -> str:
    key = dotted(place)
    if kind == "extra_forbidden":
        return unknown_key(place, value)
    section: type[Section] = DatasetSpec if place[0] in DATASET_KEYS and len(place) == 3 else Config
    if place[0] == "ray" and len(place) == 2:
        section = RaySection
    if kind == "missing":
        return f"{key}: missing; give {kinds_of(section)[str(place[-1])]}"
    if isinstance(place[-1], int):
        return f"{key}: {show(value)} is not valid; give a dataset: a map with a path"
    return f"{key}: {show(value)} is not valid; give {kinds_of(section)[str(place[-1])]}"
