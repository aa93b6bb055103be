"""A dataset entry to its files, whatever kind of thing its `path` names: files and folders here or at a URL,
what `datasets` saved, a repository on the hub."""

import os

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.listing import NamedFile, list_paths
from nemo_ray.data.saved import saved_files
from nemo_ray.data.splits import Split, files_of_split
from nemo_ray.errors import ConfigError
from nemo_ray.hub_cache import Say
from nemo_ray.storage import is_url


def files_of(spec: DatasetSpec, split: Split | None, key: str, evaluating: bool, say: Say) -> list[NamedFile]:
    """The files of an entry's split in their fixed order, ready to be read on this machine.

    `key` names the entry in messages, such as `datasets[0]`; `evaluating`: it is one of test_datasets; `say`
    is told what is waited for. Raises ConfigError.
    """
    try:
        return _files(spec, split, key, evaluating)
    except OSError as error:
        raise ConfigError(f"{key}.path: {spec.path} cannot be read: {error.strerror or error}") from None


def _files(spec: DatasetSpec, split: Split | None, key: str, evaluating: bool) -> list[NamedFile]:
    root = spec.path if is_url(spec.path) else os.path.abspath(os.path.expanduser(spec.path))
    if not spec.data_files:
        saved = saved_files(root, spec, split, key, evaluating)
        if saved is not None:
            return saved
    files = list_paths(spec, key)
    return [files[number] for number in files_of_split([file.name for file in files], split, key)]
