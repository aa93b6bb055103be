"""`key=value` on the command line: dots go into sections and lists, values are YAML."""

from typing import Any

from nemo_ray.config.translate import Raw, canonical_key, show
from nemo_ray.config.yaml_file import parse_yaml


def apply_override(raw: Raw, override: str) -> list[str]:
    """Set one key of `raw`, in place; `key=` makes it absent. Returns errors; raises ConfigError on bad YAML.

    Whether the key is known is found out with all others, later.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = canonical_key(key).split(".")
    if not equals or not all(parts):
        return [f"{override}: is not an override; write key=value, such as lora_r=32 or ray.num_workers=4"]
    if key.startswith("-"):
        return [without_dashes(override)]
    value = parse_yaml(text, override)
    target: Any = raw
    for depth, part in enumerate(parts[:-1]):
        problem = _enter_problem(target, part, parts, depth)
        if problem:
            return [problem]
        if isinstance(target, list):
            index = int(part)
            if index == len(target):
                target.append({})
            target = target[index]
        else:
            if target.get(part) is None:
                target[part] = [] if parts[depth + 1] == "0" else {}
            target = target[part]
    problem = _enter_problem(target, parts[-1], parts, len(parts) - 1)
    if problem:
        return [problem]
    _set(target, parts[-1], value)
    return []


def without_dashes(override: str) -> str:
    """The line for an override that is written like an option."""
    key, _, text = override.partition("=")
    written = f"{key.strip().lstrip('-').replace('-', '_')}={text}"
    return f"{show(override)}: overrides take no dashes; write {show(written)}"


def _set(target: Any, part: str, value: Any) -> None:
    if not isinstance(target, list):
        target[part] = value
    elif int(part) == len(target):
        target.append(value)
    else:
        target[int(part)] = value


def _enter_problem(target: Any, part: str, parts: list[str], depth: int) -> str | None:
    """Why `part` cannot be looked up in `target`, which `parts[:depth]` led to."""
    path, here = ".".join(parts), ".".join(parts[:depth])
    if isinstance(target, dict):
        return None
    if not isinstance(target, list):
        return f"{path}: {here} holds a single value; set {here}=... itself"
    if not part.isdigit() or int(part) > len(target):
        return f"{path}: {here} is a list with {len(target)} entries; use {here}.0 to {here}.{len(target)}"
    return None
