"""Which files of a dataset's repository belong to which configuration and split: the hub's rules.

The card (README.md) says so in its `configs`, else the names of files and folders do. The rules themselves
are those of `datasets`, applied to a folder of empty files with the repository's names: nothing is downloaded
and no code of the repository is run. `datasets` is imported only here. Raises ConfigError.
"""

import difflib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nemo_ray.errors import ConfigError

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_READER_OPTIONS = (
    *("sep", "delimiter", "header", "names", "column_names", "encoding", "quotechar", "quoting"),
    *("skiprows", "field", "sample_by"),
)
"""What a card may say about how its files are read, and what is not done here."""


def card_configs(card: str, where: str) -> dict[str, dict[str, Any]]:
    """Name -> the entry of `configs` in a card's front matter; {} where it has none."""
    match = _FRONT_MATTER.match(card)
    try:
        data = yaml.safe_load(match[1]) if match else None
        entries = data["configs"] if isinstance(data, dict) and "configs" in data else []
        return {str(entry["config_name"]): entry for entry in entries}
    except (yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(
            f"{where}: its README.md has no valid `configs`; name files in data_files"
        ) from None


def files_by_split(
    names: Sequence[str], card: str, config: str | None, key: str, where: str
) -> dict[str, list[str]]:
    """Split -> files, of one configuration; {} where no name is that of a data file.

    Args:
        names: all files of the repository.
        config: the configuration; None for the only one, or the default.
        key: of the entry in messages, such as `datasets[0]`; where: what the user calls the dataset.
    """
    configs = card_configs(card, f"{key}.path: {where}")
    entry = _chosen(configs, config, key, where)
    unread = [name for name in _READER_OPTIONS if name in entry]
    if unread:
        raise ConfigError(
            f"{key}.path: the card of {where} sets {', '.join(unread)} for its files, which is not "
            "supported; convert them to JSON lines or Parquet"
        )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return _resolve(root, entry, f"{key}.path: the card of {where}")


def _chosen(
    configs: Mapping[str, dict[str, Any]], config: str | None, key: str, where: str
) -> dict[str, Any]:
    if config is not None and config not in configs and (configs or config != "default"):
        close = difflib.get_close_matches(config, list(configs), n=1)
        if not configs:
            raise ConfigError(f"{key}.name: {where} has one configuration only; remove name ({config})")
        raise ConfigError(
            f"{key}.name: {where} has no configuration {config!r}"
            f"{f'; did you mean {close[0]!r}?' if close else ''} (it has {', '.join(configs)})"
        )
    if not configs:
        return {}
    if config is not None:
        return configs[config]
    defaults = [name for name, entry in configs.items() if name == "default" or entry.get("default") is True]
    if len(configs) == 1 or len(defaults) == 1:
        return configs[defaults[0]] if defaults else next(iter(configs.values()))
    raise ConfigError(f"{key}.name: missing; {where} has the configurations {', '.join(configs)}")


def _require_inside(text: str, where: str) -> None:
    """A pattern or folder of a card: below its own folder, and of no other file system."""
    if ":" in text or text.startswith(("/", "~")) or ".." in PurePosixPath(text).parts:
        raise ConfigError(f"{where} names files elsewhere ({text}), which are not read")


def _resolve(root: Path, entry: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns

    folder = str(entry.get("data_dir") or "")
    _require_inside(folder, where)
    base = root / folder
    try:
        given = entry.get("data_files")
        patterns = sanitize_patterns(given) if given else get_data_patterns(str(base))
        found: dict[str, list[str]] = {}
        for split, texts in patterns.items():
            for text in texts:
                _require_inside(text, where)
                try:
                    paths = resolve_pattern(text, str(base))
                except FileNotFoundError:
                    continue
                files = found.setdefault(str(split), [])
                files += [name for path in paths if (name := os.path.relpath(path, root)) not in files]
        return found
    except EmptyDatasetError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{where} has no valid data_files ({str(error).splitlines()[0]})") from None
