"""Which rows of a dataset's files an entry takes: the slice of its `split`, and its part of `shards`.

Owns the arithmetic and the choice of files by a split's name. Raises ConfigError.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.errors import ConfigError

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_OTHER_SPLITS = ("test", "validation", "valid", "dev")


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


def taken_rows(spec: DatasetSpec, split: Split | None, num_rows: int) -> tuple[int, int]:
    """The [first, last) of an entry's `num_rows` rows that it takes.

    With `shards: N`, the slice is cut into N runs of consecutive rows, equal to within one row, the longer
    ones first; the one numbered `shards_idx` is taken.
    """
    first, last = (0, num_rows) if split is None else split.rows(num_rows)
    if spec.shards is None:
        return first, last
    size, longer = divmod(last - first, spec.shards)
    start = first + size * spec.shards_idx + min(spec.shards_idx, longer)
    return start, start + size + (spec.shards_idx < longer)


def files_of_split(names: Sequence[str], split: Split | None, key: str) -> list[int]:
    """Numbers of the files named after the split; where no name speaks of any split, all are `train`."""
    if split is None:
        return list(range(len(names)))
    named = [number for number, name in enumerate(names) if _mentions(name, split.name)]
    if named:
        return named
    others = [name for name in names if any(_mentions(name, word) for word in _OTHER_SPLITS)]
    if split.name != "train" or (others and len(names) > 1):
        raise ConfigError(
            f"{key}.split: no file is named after {split.name!r}; files are {', '.join(names[:5])}"
        )
    return list(range(len(names)))


def _mentions(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None


def choose_split(
    splits: Sequence[str], split: Split | None, key: str, where: str, evaluating: bool = False
) -> str:
    """The one of a dataset's named splits that is meant: without a name `train`, or to evaluate on `test`."""
    if split is not None:
        if split.name in splits:
            return split.name
        raise ConfigError(f"{key}.split: {where} has no split {split.name!r}; it has {', '.join(splits)}")
    usual = "test" if evaluating else "train"
    if usual in splits:
        return usual
    if len(splits) == 1:
        return splits[0]
    raise ConfigError(f"{key}.split: missing, and {where} has no {usual!r}; choose of {', '.join(splits)}")
