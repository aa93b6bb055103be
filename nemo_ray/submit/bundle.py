"""What travels to the cluster with a job: this package, the configuration, and what it names relatively.

Nothing else of the working directory does, so that no checkpoint, dataset or secret that lies there is sent
by mistake. Absolute paths, URLs and hub ids are the cluster's own business.
"""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nemo_ray
from nemo_ray.config.checks import is_hub_dataset, is_hub_id
from nemo_ray.config.schema import Config
from nemo_ray.config.translate import show
from nemo_ray.errors import ConfigError
from nemo_ray.urls import is_url

MOST_BYTES = 200 * 2**20
"""Every node that runs a worker gets a copy of it all."""
_ASSETS = Path("demo") / "assets"  # the quickstart's base and chats, which other runs do not need


def inputs(config: Config) -> Iterator[tuple[str, str]]:
    """(key, relative path or pattern) of what the configuration reads from the working directory."""
    named = {
        "base_model": config.base_model,
        "chat_template": config.chat_template,
        "lora_model_dir": config.lora_model_dir if config.adapter else None,
    }
    for name, specs in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, spec in enumerate(specs):
            if not is_hub_dataset(spec.path):
                named[f"{name}.{index}.path"] = spec.path
            named[f"{name}.{index}.chat_template"] = spec.chat_template
    for key, value in named.items():
        if value is None or is_url(value) or os.path.isabs(value):
            continue
        if key == "base_model" and is_hub_id(value):
            continue
        if (
            key.endswith("chat_template")
            and not value.endswith((".jinja", ".j2"))
            and not os.path.exists(value)
        ):
            continue  # tokenizer_default and the like
        yield key, value


def bundle(path: Path, config: Config, cwd: Path, folder: Path) -> str:
    """Copy what the job of the configuration in the file `path` needs to the empty `folder`; returns the path
    of the configuration in it.

    Raises: ConfigError where something is not there, lies outside `cwd`, or is too much.
    """
    found = [(key, name) for key, value in inputs(config) for name in _find(key, value, cwd)]
    sizes = {(key, name): _bytes(cwd / name) for key, name in found}  # before anything is copied
    if sum(sizes.values()) > MOST_BYTES:
        key, name = largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"{key}: {name} has {sizes[largest] / 2**20:,.0f} MiB; at most {MOST_BYTES // 2**20} MiB travel "
            "with a job: put it where every node sees it, or in an object store, and give that path"
        )
    package = Path(nemo_ray.__file__).parent
    shutil.copytree(package, folder / "nemo_ray", ignore=_without_assets(package))
    for _, name in found:
        target = folder / os.path.normpath(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (cwd / name).is_dir():
            shutil.copytree(cwd / name, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(cwd / name, target)
    inside = path.resolve().is_relative_to(cwd.resolve())
    there = path.resolve().relative_to(cwd.resolve()) if inside else Path(path.name)
    (folder / there).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / there)
    return there.as_posix()


def _find(key: str, value: str, cwd: Path) -> list[str]:
    """What a relative path or pattern names. Raises: ConfigError where that is nothing, or lies elsewhere."""
    found = sorted(glob.glob(value, root_dir=cwd, recursive=True)) if glob.has_magic(value) else [value]
    if not found or not (cwd / found[0]).exists():
        raise ConfigError(
            f"{key}: {show(value)} is not here, from where it would travel; give an absolute path that "
            "every node sees, or a URL"
        )
    for name in found:
        if not (cwd / name).resolve().is_relative_to(cwd.resolve()):
            raise ConfigError(
                f"{key}: {show(name)} lies outside of the working directory, and does not travel; start "
                "there, or give an absolute path that every node sees"
            )
    return found


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _without_assets(package: Path) -> Callable[[str, list[str]], list[str]]:
    def ignored(folder: str, names: list[str]) -> list[str]:
        skip = [name for name in names if name == "__pycache__"]
        inside = Path(folder).relative_to(package)
        return skip + [name for name in names if inside / name == _ASSETS]

    return ignored
