"""Base models by their id on the Hugging Face hub: each node fetches one copy, of one commit.

Owns which files of a repository are fetched (never code, never pickles), and when. How they reach the disk
is hub_cache.py's. huggingface_hub speaks the protocol and lays out the cache; its environment variables
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) hold here too. It is imported where a hub id is met, so that
folders cost nothing.

A *reference* is what is handed around inside: a folder, or `owner/name@revision`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nemo_ray.bare import is_bare
from nemo_ray.config.checks import is_hub_dataset, is_hub_id, model_folder_errors
from nemo_ray.config.schema import Config, ModelSection
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.hub_cache import (
    RefusedError,
    Repository,
    Say,
    explained,
    fetch_blobs,
    no_bar,
    node_lock,
    require_room,
)

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

ConfigT = TypeVar("ConfigT", bound=ModelSection)

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
"""All that is needed of a repository besides its weights."""

VARIABLES = ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
"""What the user sets for the driver and means for every node."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)@(\S+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def variables_to_pass_on(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The hub's variables for processes on other nodes; none where all is in folders."""
    datasets = (*config.datasets, *config.test_datasets)
    if not is_reference(reference(config)) and not any(is_hub_dataset(spec.path) for spec in datasets):
        return {}
    return {name: environ[name] for name in VARIABLES if name in environ}


def reference(config: ModelSection) -> str:
    """The base model of a configuration as `local_folder` takes it. A folder that is there is a folder."""
    return (
        f"{config.base_model}@{config.revision_of_model}"
        if is_hub_id(config.base_model)
        else config.base_model
    )


def is_reference(model: str) -> bool:
    """Whether it names a model on the hub, not a folder."""
    return bool(_REFERENCE.fullmatch(model)) and not os.path.isdir(model)


def pin(config: ConfigT, revision: str | None = None, *, weights: bool, here: bool) -> ConfigT:
    """For the driver: fetch the small files, and put the commit in place of the revision.

    Args:
        revision: instead of the configuration's.
        weights: whether there have to be weights to fetch later.
        here: whether they will be fetched on this machine: then its disk is looked at now.

    A folder is left alone. Raises ConfigError.
    """
    model = reference(config)
    if not is_reference(model):
        return config
    name, asked = _split(model)
    with explained(Repository(name), revision or asked, ConfigError):
        folder = _snapshot(name, revision or asked, SMALL_FILES)
        for line in model_folder_errors(str(folder), name):
            raise ConfigError(line)
        if weights and not _weights_present(folder):
            files = _weight_files(name, folder)
            if here:
                require_room(Repository(name), folder, files)
    return config.model_copy(update={"revision_of_model": folder.name})


def local_folder(model: str, *, weights: bool, say: Say = lambda text: None) -> Path:
    """The folder of a reference on this machine, fetched first where it is missing.

    Processes of a node that ask at the same time wait for one that fetches; `say` is told what is waited
    for. A commit that is complete here is not asked for again. Without `weights` only SMALL_FILES are sure
    to be there. A folder is returned as it is. Raises CheckpointError.
    """
    if not is_reference(model):
        return Path(model)
    name, revision = _split(model)
    with explained(Repository(name), revision, CheckpointError):
        found = _complete(name, revision, weights)
        if found is not None:
            return found
        with node_lock(Repository(name), say):
            folder = _complete(name, revision, weights) or _snapshot(name, revision, SMALL_FILES)
            if not weights or _weights_present(folder):
                return folder
            files = _weight_files(name, folder)
            require_room(Repository(name), folder, files)
            fetch_blobs(Repository(name), folder, files, say)
            return _snapshot(name, folder.name, [*SMALL_FILES, *(file.path for file in files)])


def _split(model: str) -> tuple[str, str]:
    name, _, revision = model.partition("@")
    return name, revision


# -- what is here, and what is fetched ------------------------------------------------------------


def _snapshot(name: str, revision: str, files: Sequence[str], local_only: bool = False) -> Path:
    """Make the files of a revision present that the repository has; returns the folder, named by commit."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(files),
            local_files_only=local_only,
            tqdm_class=no_bar(),
        )
    )


def _complete(name: str, revision: str, weights: bool) -> Path | None:
    """The folder of a commit of which nothing is missing, without asking the network."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    if not _COMMIT.fullmatch(revision):
        return None  # a branch can have moved
    try:
        # Without the list of the repository's files, one that another program left out would not be missed.
        huggingface_hub.get_cached_repo_tree(name, revision=revision)
        folder = _snapshot(name, revision, SMALL_FILES, local_only=True)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None
    return folder if not weights or _weights_present(folder) else None


def _indexed(folder: Path) -> set[str] | None:
    """The weight files that the index names; None where there is no index."""
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names:
        raise RefusedError(f"base_model: {path} is no index of weights; name a model with a complete one")
    for name in names:
        if not is_bare(name) or not name.endswith(".safetensors"):
            raise RefusedError(f"base_model: {path} names {name!r}, which is no safetensors file beside it")
    return names


def _weights_present(folder: Path) -> bool:
    return all((folder / file).is_file() for file in _indexed(folder) or {_SINGLE})


def _weight_files(name: str, folder: Path) -> list["RepoFile"]:
    """The safetensors files of the commit that `folder` is named by; asks the hub."""
    import huggingface_hub

    tree = huggingface_hub.HfApi().list_repo_tree(name, revision=folder.name)
    found = {entry.path: entry for entry in tree if isinstance(entry, huggingface_hub.RepoFile)}
    indexed = _indexed(folder)
    if indexed is None and _SINGLE not in found:
        others = sorted(path for path in found if path.endswith((".bin", ".pt", ".pth", ".gguf", ".nemo")))
        has = f" (it has {others[0]})" if others else ""
        raise RefusedError(
            f"base_model: {name} holds neither {_SINGLE} nor {_INDEX}{has}; name a model with safetensors"
        )
    wanted = indexed or {_SINGLE}
    lacking = sorted(wanted - found.keys())
    if lacking:
        raise RefusedError(f"base_model: {_INDEX} of {name} names {lacking[0]}, which is not there")
    return [found[path] for path in sorted(wanted)]
