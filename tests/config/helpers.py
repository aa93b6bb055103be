"""What the tests of the configuration share: a folder with base model and data, YAML made from a dict."""

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_ray.config.load import LoadedConfig, load_config
from nemo_ray.errors import ConfigError

Keys = dict[str, Any]


def make_world(folder: Path) -> Keys:
    """The smallest valid full fine-tune, with files that exist."""
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "nemotron_h"}))
    (folder / "rows.jsonl").write_text('{"messages": []}\n')
    return {"base_model": str(base), "datasets": [{"path": str(folder / "rows.jsonl")}]}


def lora(world: Keys) -> Keys:
    return world | {"adapter": "lora", "lora_target_modules": ["q_proj"]}


def load(world: Keys, *overrides: str, **options: bool) -> LoadedConfig:
    """Through a file in the working directory, as a user would."""
    Path("config.yaml").write_text(yaml.safe_dump(world, sort_keys=False), encoding="utf-8")
    return load_config("config.yaml", overrides, **options)


def errors_of(world: Keys, *overrides: str, **options: bool) -> list[str]:
    """The lines of the ConfigError that the configuration gives; none if it loads."""
    try:
        load(world, *overrides, **options)
    except ConfigError as error:
        return str(error).splitlines()
    return []
