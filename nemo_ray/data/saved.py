"""Folders that `datasets` wrote with `save_to_disk`: which files, in which order. Does not import it."""

import json
from collections.abc import Iterable
from typing import Any

from nemo_ray.bare import is_bare
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.listing import NamedFile
from nemo_ray.data.splits import Split, choose_split
from nemo_ray.errors import ConfigError
from nemo_ray.storage import file_facts, open_input

_OF_SPLITS = "dataset_dict.json"
_STATE = "state.json"


def saved_files(
    folder: str, spec: DatasetSpec, split: Split | None, key: str, evaluating: bool
) -> list[NamedFile] | None:
    """The data files of a saved Dataset, or of one split of a saved DatasetDict; None for other folders."""
    folder = folder.rstrip("/")
    prefix = f"{folder.rsplit('/', 1)[-1]}/"
    if file_facts(f"{folder}/{_OF_SPLITS}") is not None:
        splits = _read(f"{folder}/{_OF_SPLITS}", key, "splits")
        _require_bare(splits, folder, key)
        name = choose_split(splits, split, key, spec.path, evaluating)
        folder, prefix = f"{folder}/{name}", f"{prefix}{name}/"
    elif file_facts(f"{folder}/{_STATE}") is None:
        return None
    names = [file["filename"] for file in _read(f"{folder}/{_STATE}", key, "_data_files")]
    _require_bare(names, folder, key)
    return [NamedFile(f"{folder}/{name}", prefix + name, "arrow") for name in names]


def _require_bare(names: Iterable[object], folder: str, key: str) -> None:
    for name in names:
        if not is_bare(name):
            raise ConfigError(
                f"{key}.path: {folder} names {name!r}, which is no name of its own; save it again"
            )


def _read(path: str, key: str, field: str) -> Any:
    try:
        with open_input(path) as file:
            return json.loads(file.read())[field]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{key}.path: {path} cannot be read ({error}); save the dataset again") from None
