"""Which files a dataset entry names, and which of their rows its split takes. Raises ConfigError."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.files import sniff_json
from nemo_ray.data.manifest import FileFormat
from nemo_ray.errors import ConfigError

_SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class NamedFile(NamedTuple):
    """A file, and its name within the dataset, which does not change when the dataset moves."""

    path: Path
    name: str
    format: FileFormat


class Split(NamedTuple):
    """A parsed `split`: `train[100:200]`, `train[:20%]`; negative numbers count from the end."""

    name: str
    start: str | None
    stop: str | None

    def rows(self, num_rows: int) -> tuple[int, int]:
        """[first, last) of `num_rows` rows; percentages round to the nearest row."""
        first = 0 if self.start is None else _position(self.start, num_rows)
        last = num_rows if self.stop is None else _position(self.stop, num_rows)
        return first, max(first, last)


def _position(text: str, num_rows: int) -> int:
    value = round(int(text[:-1]) * num_rows / 100) if text.endswith("%") else int(text)
    return min(max(value + num_rows if value < 0 else value, 0), num_rows)


def parse_split(text: str | None, key: str) -> Split | None:
    """`key` names the entry in messages, such as `datasets[0]`."""
    if text is None:
        return None
    match = _SPLIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"{key}.split: {text!r} is no split; write it as train, train[:20%] or train[100:200]"
        )
    return Split(match["name"], match["start"], match["stop"])


def list_files(spec: DatasetSpec, split: Split | None, key: str) -> list[NamedFile]:
    """The entry's files in their fixed order: as given in data_files, sorted by name in a folder."""
    root = Path(spec.path).expanduser()
    if not root.exists() and spec.path in ("json", "parquet") and spec.data_files:
        root = Path()  # the spelling of datasets.load_dataset("json", data_files=...)
    if not root.exists():
        raise ConfigError(
            f"{key}.path: {spec.path} is not there; give a file, or a folder of .jsonl or .parquet files"
        )
    root = root.absolute()
    if root.is_file():
        paths, base = [root], root.parent
    elif spec.data_files:
        paths, base = _data_files(root, spec.data_files, key), root
    else:
        paths, base = _folder_files(root, spec.ds_type), root
        if not paths:
            raise ConfigError(f"{key}.path: {spec.path} holds no .jsonl, .json or .parquet file")
    prefix = "" if root.is_file() else f"{root.name}/"
    named = [
        NamedFile(path, prefix + _relative(path, base), _format(path, spec.ds_type, f"{key}.ds_type"))
        for path in paths
    ]
    return _of_split(named, split, f"{key}.split")


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _data_files(root: Path, patterns: Sequence[str], key: str) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        where = str(root / Path(pattern).expanduser())
        found = [where] if Path(where).is_file() else sorted(glob.glob(where, recursive=True))
        files = [Path(path) for path in found if Path(path).is_file()]
        if not files:
            raise ConfigError(f"{key}.data_files: {pattern} matches no file in {root}")
        paths += files
    return list(dict.fromkeys(paths))


def _folder_files(root: Path, ds_type: str | None) -> list[Path]:
    """Data files of a folder. A .json file beside .jsonl or .parquet files describes them: left out."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in _SUFFIXES)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if ds_type is not None:
        files = [path for path in files if (path.suffix.lower() == ".parquet") == (ds_type == "parquet")]
    rows = [path for path in files if path.suffix.lower() != ".json"]
    return rows or files


def _format(path: Path, ds_type: str | None, key: str) -> FileFormat:
    if ds_type is None and path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{key}: the format of {path} cannot be told from its suffix; give json or parquet")
    if ds_type == "parquet" or (ds_type is None and _SUFFIXES[path.suffix.lower()] == "parquet"):
        return "parquet"
    try:
        return sniff_json(str(path))
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror or error}") from None


def _of_split(files: list[NamedFile], split: Split | None, key: str) -> list[NamedFile]:
    """The files named after the split; where no name speaks of any split, all files are `train`."""
    if split is None:
        return files
    named = [file for file in files if _mentions(file.name, split.name)]
    if named:
        return named
    others = [
        file
        for file in files
        if any(_mentions(file.name, word) for word in ("test", "validation", "valid", "dev"))
    ]
    if split.name != "train" or (others and len(files) > 1):
        raise ConfigError(
            f"{key}: no file is named after {split.name!r}; files are {', '.join(f.name for f in files[:5])}"
        )
    return files


def _mentions(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None
