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
    package = Path(nemo_ray.__file__).parent
    shutil.copytree(package, folder / "nemo_ray", ignore=_without_assets(package))
    sizes: dict[str, int] = {}
    for key, value in inputs(config):
        found = sorted(glob.glob(value, root_dir=cwd, recursive=True)) if glob.has_magic(value) else [value]
        if not found or not (cwd / found[0]).exists():
            raise ConfigError(
                f"{key}: {show(value)} is not here, from where it would travel; give an absolute path that "
                "every node sees, or a URL"
            )
        for name in found:
            sizes[f"{key}: {name}"] = _copy(key, cwd, name, folder)
    inside = path.resolve().is_relative_to(cwd.resolve())
    there = path.resolve().relative_to(cwd.resolve()) if inside else Path(path.name)
    (folder / there).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / there)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if total > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"{largest} has {sizes[largest] / 2**20:,.0f} MiB; at most {MOST_BYTES // 2**20} MiB travel with "
            "a job: put it where every node sees it, or in an object store, and give that path"
        )
    return there.as_posix()


def _copy(key: str, cwd: Path, name: str, folder: Path) -> int:
    """Copy a file or folder to the same relative place; returns its bytes."""
    source = cwd / name
    if not source.resolve().is_relative_to(cwd.resolve()):
        raise ConfigError(
            f"{key}: {show(name)} lies outside of the working directory, and does not travel; start there, "
            "or give an absolute path that every node sees"
        )
    target = folder / os.path.normpath(name)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return source.stat().st_size


def _without_assets(package: Path) -> Callable[[str, list[str]], list[str]]:
    def ignored(folder: str, names: list[str]) -> list[str]:
        skip = [name for name in names if name == "__pycache__"]
        inside = Path(folder).relative_to(package)
        return skip + [name for name in names if inside / name == _ASSETS]

    return ignored
