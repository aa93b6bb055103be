"""A dataset of the hub to its data files: which of them an entry takes, and their download, if any."""

import re
from collections.abc import Sequence

from fsspec.utils import glob_translate

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.card import files_by_split
from nemo_ray.data.listing import NamedFile, data_file_names, named_file
from nemo_ray.data.splits import Split, choose_split, files_of_split
from nemo_ray.errors import ConfigError
from nemo_ray.hub_cache import Say
from nemo_ray.hub_datasets import Listing, fetch_files, is_streamed, list_dataset, local_path
from nemo_ray.hub_stream import require_ranges


def hub_files(
    spec: DatasetSpec, split: Split | None, key: str, evaluating: bool, say: Say
) -> list[NamedFile]:
    """The files of an entry's configuration and split, on this node unless they are streamed.

    Raises ConfigError.
    """
    listing = list_dataset(spec.path, spec.revision or "main", key)
    names = [file.path for file in listing.files]
    if spec.data_files:
        chosen = _matching(names, spec, key)
        chosen = [chosen[number] for number in files_of_split(chosen, split, key)]
    else:
        splits = files_by_split(names, listing.card, spec.name, key, spec.path)
        splits = {name: data_file_names(files, spec) for name, files in splits.items()}
        splits = {name: files for name, files in splits.items() if files}
        if not splits:
            _refuse(names, listing, spec, key)
        chosen = splits[choose_split(list(splits), split, key, spec.path, evaluating)]
    by_name = {file.path: file for file in listing.files}
    wanted = [by_name[name] for name in chosen]
    if not spec.streaming:
        fetch_files(listing, wanted, say)
    elif is_streamed(local_path(listing.reference(wanted[0].path, streamed=True))):
        require_ranges(listing, wanted[0].path)
    folder = spec.path.split("/")[-1]
    return [
        named_file(
            listing.reference(file.path, spec.streaming),
            f"{folder}/{file.path}",
            spec,
            key,
            known_as=listing.known_as(file),
        )
        for file in wanted
    ]


def _matching(names: Sequence[str], spec: DatasetSpec, key: str) -> list[str]:
    found: list[str] = []
    for pattern in spec.data_files:
        expression = re.compile(glob_translate(pattern))
        files = [name for name in names if name == pattern or expression.match(name)]
        if not files:
            raise ConfigError(f"{key}.data_files: {pattern} matches no file of {spec.path}")
        found += files
    return list(dict.fromkeys(found))


def _refuse(names: Sequence[str], listing: Listing, spec: DatasetSpec, key: str) -> None:
    script = f"{spec.path.split('/')[-1]}.py"
    if script in names:
        raise ConfigError(
            f"{key}.path: {spec.path} makes its rows by a Python script ({script}), and no code of a dataset "
            "is run; if the hub has converted it, give `revision: refs/convert/parquet` and `data_files: "
            "CONFIGURATION/SPLIT/*.parquet`"
        )
    raise ConfigError(
        f"{key}.path: {spec.path} at {listing.commit[:8]} holds no file of JSON lines, JSON, CSV, Parquet, "
        f"Arrow or text for it; it has {', '.join(names[:5]) or 'no files'}"
    )
