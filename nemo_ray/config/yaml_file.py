"""Reading the YAML itself: plain data, no key twice, `2e-4` is a number. What keys mean is not known here."""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from nemo_ray.errors import ConfigError

STANDARD_INPUT = "-"
_MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2's idea of a number and without silent duplicates."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice (first on line {seen[key.value]}): keep one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return node


# PyYAML follows YAML 1.1, where `2e-4` is text: axolotl files and people write it as a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML text. Raises ConfigError with `where` and the line of a syntax error."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = " ".join((error.problem or error.context or "not valid YAML").split())
        if problem.startswith("but "):  # PyYAML's sentence, whose beginning is the context
            problem = f"{error.context}, {problem}; give one map"
        elif problem == "found unhashable key":
            problem = "a key is a list or a map, not text; write `key: value`"
        elif "could not determine a constructor" in problem:
            problem += "; only plain text, numbers, lists and maps are read: write the value itself"
        raise ConfigError(f"{place}: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError, TypeError) as error:  # such as the date 2024-99-99
        raise ConfigError(f"{where}: not valid YAML: {type(error).__name__}: {error}") from None
    _check_plain(value, where)
    return value


def _check_plain(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Keys are text (YAML also reads `on:` and `1:` as keys), and lists and maps end somewhere."""
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where}: {key.split('.')[0]} refers to itself, or is nested too deeply")
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                kind = type(name).__name__
                raise ConfigError(
                    f"{where}: the key {key}{name} is {kind}, not text; quote it if it is meant"
                )
            _check_plain(item, where, f"{key}{name}.", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, where, f"{key}{index}.", depth + 1)


def read_yaml(path: str) -> dict[str, Any]:
    """The map that a YAML file holds, or standard input (`-`); an empty one holds an empty map. Raises
    ConfigError."""
    if not path:
        raise ConfigError("CONFIG.yaml: '' names no file; give the path of a YAML file")
    where = "standard input" if path == STANDARD_INPUT else path
    try:
        text = _content(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is not text in UTF-8; give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
    raw = parse_yaml(text, where)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: holds {type(raw).__name__}, not a map; write one `key: value` a line")
    return raw


def _content(path: str) -> bytes:
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise ConfigError(
                "CONFIG.yaml: - is standard input, which is closed; pipe the configuration into it"
            )
        return sys.stdin.buffer.read()
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"{path}: is a folder; give the YAML file")
    return file.read_bytes()
