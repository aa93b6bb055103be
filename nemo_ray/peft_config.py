"""PEFT's adapter_config.json: the adapter that it describes, and whether a run can go on from it. No torch.

Reading the tensors beside it is model/adapter_reader.py's.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import ConfigError
from nemo_ray.storage import read_json
from nemo_ray.targets import (
    Shape,
    Strength,
    expert_paths,
    find_targets,
    linear_paths,
    saved_modules,
    strength_of,
)

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
# What changes the result and is not a plain product of two factors, with the values that leave it off.
_UNREAD: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
}
# PEFT takes the first product off the base with these, so the factors alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What narrows PEFT's choice of targets down, with the values that leave it off.
_NARROWING = {
    "exclude_modules": (None, [], ""),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
}


def read_adapter_config(folder: Path, key: str = "adapter") -> dict[str, Any]:
    """adapter_config.json of a LoRA's folder, as it is; `key`: what the user named the folder with.

    Raises: ConfigError where there is none, or it is of a kind that is not read here.
    """
    path = folder / CONFIG_NAME
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{key}: {path} does not exist; name the folder of a PEFT adapter") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ConfigError(f"{key}: {path} has peft_type {found!r}, and LORA only is read here")
    for name, off in _UNREAD.items():
        if name in config and config[name] not in off:
            raise ConfigError(f"{key}: {path} has {name}: {config[name]!r}, which is not read here")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{key}: {path} has init_lora_weights {init!r}, which changes the base's weights; save it from "
            "PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return config


def section_of(config: Mapping[str, Any]) -> AdapterSection:
    """The adapter that PEFT's adapter_config.json describes.

    Its targets are written as expressions: PEFT lets a name of a list match nothing, as long as another does.
    Raises: ConfigError where a value is none that a LoRA can have, or one that is not read here.
    """
    given = {key: value for key, value in config.items() if value is not None}
    for key, off in _NARROWING.items():
        if given.get(key) not in off:
            raise ConfigError(
                f"adapter: {CONFIG_NAME} has {key}: {given[key]!r}, which is not read here; name its "
                "targets in target_modules as whole paths"
            )
    everywhere = given.get("target_modules") == "all-linear"
    values = {
        "adapter": "lora",
        "lora_r": given.get("r", 8),  # PEFT's own defaults
        "lora_alpha": given.get("lora_alpha", 8),
        "peft_use_rslora": given.get("use_rslora", False),
        "rank_pattern": given.get("rank_pattern", {}),
        "alpha_pattern": given.get("alpha_pattern", {}),
        "lora_target_linear": everywhere,
        "lora_target_modules": () if everywhere else _expressions(given.get("target_modules", ())),
        "lora_target_parameters": _expressions(given.get("target_parameters", ())),
        "lora_modules_to_save": given.get("modules_to_save", ()),
    }
    try:
        return AdapterSection(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).removeprefix("lora_")
        raise ConfigError(
            f"adapter: {CONFIG_NAME} has {key}: {first['input']!r}, which no LoRA has: {first['msg']}"
        ) from None


def _expressions(targets: Any) -> tuple[str, ...]:
    """PEFT's targets as one expression: a text is one already, a list holds ends of paths."""
    if isinstance(targets, str):
        return (f"(?:{targets})",)
    names = sorted(re.escape(str(name)) for name in targets)
    return (rf"(?:.*\.)?(?:{'|'.join(names)})",) if names else ()


def check_adapter_dir(adapter: AdapterSection, shape: Shape) -> None:
    """Refuse what the adapter_config.json of `lora_model_dir` shows not to fit this run.

    Raises: ConfigError with the first difference and both values.
    """
    assert adapter.lora_model_dir is not None
    folder = Path(adapter.lora_model_dir)
    for file in (folder / CONFIG_NAME, folder / TENSORS_NAME):
        if not file.is_file():
            inside = folder / "adapter"
            remedy = f"give {inside}" if (inside / CONFIG_NAME).is_file() else "give the folder of an adapter"
            raise ConfigError(f"lora_model_dir: {file} does not exist; {remedy}")
    config = read_adapter_config(folder, "lora_model_dir")
    linears, banks = linear_paths(shape), expert_paths(shape)
    try:
        theirs = section_of(config)
        found = find_targets(theirs, linears, banks)
        whole = saved_modules(theirs)
    except ConfigError as error:
        raise ConfigError(f"lora_model_dir: {folder} does not fit this base: {error}") from None
    wanted = find_targets(adapter, linears, banks)
    for key, ours, other in (
        ("lora_target_modules", wanted[0], found[0]),
        ("lora_target_parameters", wanted[1], found[1]),
        ("lora_modules_to_save", list(saved_modules(adapter)), list(whole)),
    ):
        _require_same(f"lora_model_dir: {folder}", key, ours, other)
    for target in (*wanted[0], *wanted[1]):
        require_strength(
            f"lora_model_dir: {folder}", target, strength_of(adapter, target), strength_of(theirs, target)
        )


def _require_same(where: str, key: str, ours: list[str], theirs: list[str]) -> None:
    for missing, owner, other in (
        (set(ours) - set(theirs), "this run trains", "it does not"),
        (set(theirs) - set(ours), "it has", "this run does not train"),
    ):
        if missing:
            raise ConfigError(f"{where}: {owner} {min(missing)}, which {other}; change {key}")


def require_strength(where: str, target: str, ours: Strength, theirs: Strength) -> None:
    """Raises: ConfigError where rank or scaling of `target` differ from those of the adapter at `where`."""
    if ours.rank != theirs.rank:
        raise ConfigError(
            f"{where} has rank {theirs.rank} on {target}, and this run rank {ours.rank}; set lora_r (or "
            "rank_pattern) as it was"
        )
    if not math.isclose(ours.scaling, theirs.scaling, rel_tol=1e-6):
        raise ConfigError(
            f"{where} scales {target} by {theirs.scaling:g}, and this run by {ours.scaling:g}; set "
            "lora_alpha, alpha_pattern and peft_use_rslora as they were"
        )
