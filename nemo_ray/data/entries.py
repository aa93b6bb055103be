"""A dataset entry to its files, whatever kind of thing its `path` names: files and folders here or at a URL,
what `datasets` saved, a repository on the hub."""

import os

from nemo_ray.config.checks import is_hub_dataset
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.card import card_configs, files_by_split
from nemo_ray.data.hub_source import hub_files
from nemo_ray.data.listing import NamedFile, data_file_names, list_paths, named_file
from nemo_ray.data.saved import saved_files
from nemo_ray.data.splits import Split, choose_split, files_of_split
from nemo_ray.errors import ConfigError
from nemo_ray.hub_cache import Say
from nemo_ray.storage import file_facts, is_url, list_files, open_input


def files_of(spec: DatasetSpec, split: Split | None, key: str, evaluating: bool, say: Say) -> list[NamedFile]:
    """The files of an entry's split in their fixed order, ready to be read on this machine.

    `key` names the entry in messages, such as `datasets[0]`; `evaluating`: it is one of test_datasets; `say`
    is told what is waited for. Raises ConfigError.
    """
    try:
        if is_hub_dataset(spec.path):
            return hub_files(spec, split, key, evaluating, say)
        return _files(spec, split, key, evaluating)
    except OSError as error:
        raise ConfigError(f"{key}.path: {spec.path} cannot be read: {error.strerror or error}") from None


def _files(spec: DatasetSpec, split: Split | None, key: str, evaluating: bool) -> list[NamedFile]:
    root = spec.path if is_url(spec.path) else os.path.abspath(os.path.expanduser(spec.path))
    if not spec.data_files:
        saved = saved_files(root, spec, split, key, evaluating)
        if saved is not None:
            return saved
        carded = _of_card(root.rstrip("/"), spec, split, key, evaluating)
        if carded is not None:
            return carded
    files = list_paths(spec, key)
    return [files[number] for number in files_of_split([file.name for file in files], split, key)]


def _of_card(
    root: str, spec: DatasetSpec, split: Split | None, key: str, evaluating: bool
) -> list[NamedFile] | None:
    """The files that the dataset card in a folder names; None where there is none with configurations."""
    card = ""
    if file_facts(f"{root}/README.md") is not None:
        with open_input(f"{root}/README.md") as file:
            card = file.read().decode("utf-8", "replace")
    if not card_configs(card, f"{key}.path: {spec.path}"):
        if spec.name is not None:
            raise ConfigError(f"{key}.name: {spec.path} has no card with configurations; remove {spec.name}")
        return None
    names = [path[len(root) + 1 :] for path in list_files(root)]
    splits = files_by_split(names, card, spec.name, key, spec.path)
    name = choose_split(list(splits), split, key, spec.path, evaluating)
    folder = root.rsplit("/", 1)[-1]
    return [
        named_file(f"{root}/{file}", f"{folder}/{file}", spec, key)
        for file in data_file_names(splits[name], spec)
    ]
