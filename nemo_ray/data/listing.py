"""Which files a dataset entry names, by path, glob, folder or URL, in their fixed order.

Owns the forms of a path and the formats that suffixes stand for. A repository on the hub is listed by
repository.py, the folders that `datasets` saves by saved.py. Raises ConfigError.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from fsspec.utils import glob_translate

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.manifest import FileFormat
from nemo_ray.data.unpack import split_compression
from nemo_ray.errors import ConfigError
from nemo_ray.storage import file_facts, is_url, list_files

SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_JSON: tuple[FileFormat, ...] = ("json", "jsonl")
_KNOWN = ".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file"


class NamedFile(NamedTuple):
    """A file to read.

    `path`: a local path or a URL. `name`: within the dataset; it does not change when the dataset moves.
    `format`: `json` and `jsonl` still to be told apart by the content. `known_as`: what the content is known
    by without reading it.
    """

    path: str
    name: str
    format: FileFormat
    known_as: str | None = None


def format_of(name: str) -> FileFormat | None:
    """By the suffix, before that of a compression; None for other files."""
    suffix = os.path.splitext(split_compression(name)[0])[1].lower()
    return SUFFIXES.get(suffix)


def named_file(path: str, name: str, spec: DatasetSpec, key: str, known_as: str | None = None) -> NamedFile:
    """A file in the format that `ds_type`, or else its suffix, says."""
    found = format_of(name)
    if spec.ds_type is not None and not (spec.ds_type == "json" and found in _JSON):
        return NamedFile(path, name, spec.ds_type, known_as)
    if found is None:
        raise ConfigError(
            f"{key}.ds_type: the format of {path} cannot be told from its suffix; give json, csv, tsv, "
            "parquet, arrow or text"
        )
    return NamedFile(path, name, found, known_as)


def is_glob(path: str) -> bool:
    """Whether a path has wildcards."""
    return any(letter in path for letter in "*?[")


def list_paths(spec: DatasetSpec, key: str) -> list[NamedFile]:
    """The files of a path that is here or at a URL: as given in data_files, else sorted by name."""
    root = spec.path if is_url(spec.path) else os.path.abspath(os.path.expanduser(spec.path))
    if is_glob(root) and not _exists(root):
        base = _before_wildcards(root)
        paths = _matching(root, base)
        if not paths:
            raise ConfigError(f"{key}.path: {spec.path} matches no file")
    elif _is_file(root):
        return [named_file(root, root.rsplit("/", 1)[-1], spec, key)]
    elif spec.data_files:
        base, paths = root, _data_files(root, spec.data_files, key)
    else:
        base, paths = root, _folder_files(root, spec)
        if not paths:
            _refuse_empty(root, spec, key)
    return [named_file(path, _name(path, base), spec, key) for path in paths]


def _name(path: str, base: str) -> str:
    """`base` is the dataset's folder: its own name is part of the files' names."""
    base = base.rstrip("/")
    if not path.startswith(base + "/"):
        return path
    return f"{base.rsplit('/', 1)[-1]}/{path[len(base) + 1 :]}"


def _exists(path: str) -> bool:
    return _is_file(path) if is_url(path) else os.path.exists(path)


def _is_file(path: str) -> bool:
    return file_facts(path) is not None


def _before_wildcards(pattern: str) -> str:
    """The folder that holds everything that a pattern can match."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if is_glob(part))
    return "/".join(parts[:first])


def _matching(pattern: str, base: str) -> list[str]:
    """Files that match; hidden ones only where the pattern names the dot."""
    expression = re.compile(glob_translate(pattern))
    return [
        path
        for path in list_files(base)
        if expression.match(path) and ("/." in pattern or not _is_hidden(path[len(base) :]))
    ]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _data_files(root: str, patterns: Sequence[str], key: str) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if is_url(expanded):
            where = expanded
        else:
            where = f"{root}/{expanded}" if is_url(root) else os.path.normpath(os.path.join(root, expanded))
        if _is_file(where):
            found = [where]
        else:
            found = _matching(where, _before_wildcards(where)) if is_glob(where) else []
        if not found:
            raise ConfigError(f"{key}.data_files: {pattern} matches no file in {root}")
        paths += found
    return list(dict.fromkeys(paths))


def _folder_files(root: str, spec: DatasetSpec) -> list[str]:
    base = root.rstrip("/")
    names = [path[len(base) + 1 :] for path in list_files(base)]
    return [f"{base}/{name}" for name in data_file_names(names, spec)]


def data_file_names(names: Sequence[str], spec: DatasetSpec) -> list[str]:
    """Those of a folder's files that hold rows. A .json file beside others describes them: left out."""
    found = {name: form for name in names if (form := format_of(name)) and not _is_hidden(name)}
    if spec.ds_type is not None:
        wanted = _JSON if spec.ds_type == "json" else (spec.ds_type,)
        found = {name: form for name, form in found.items() if form in wanted}
    rows = [name for name, form in found.items() if form not in ("json", "text")]
    return rows or [name for name, form in found.items() if form == "json"] or list(found)


def _refuse_empty(root: str, spec: DatasetSpec, key: str) -> None:
    if not is_url(root) and not os.path.isdir(root):
        raise ConfigError(
            f"{key}.path: {spec.path} is not there; give a file, a folder, a pattern such as data/*.jsonl, a "
            "URL, or a dataset of the hub as owner/name"
        )
    kind = _KNOWN if spec.ds_type is None else f"{spec.ds_type} file"
    gone = "is not there, or " if is_url(root) else ""
    raise ConfigError(f"{key}.path: {spec.path} {gone}holds no {kind}")
