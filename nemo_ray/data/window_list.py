"""Windows, and many of them in little memory: columns of numbers, from which a window is made when asked for.

Ten billion short rows are half a million windows, and every worker holds the list: as objects it would take
300 MB of each, as columns 60.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nemo_ray.data.manifest import SourceInfo

Int64 = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Consecutive rows of one file.

    `start`, `stop` address them: bytes of a jsonl file, elements of a json array, row groups of a parquet
    file. `first_row` counts rows from the beginning of the file.
    """

    file: int
    start: int
    stop: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Window:
    """Rows that are prepared together into one shard: they are packed among themselves only."""

    source: int
    spans: tuple[Span, ...]
    num_rows: int
    key: str

    def source_rows(self, source: "SourceInfo") -> list[tuple[int, int]]:
        """(first row in the source, number of rows) of each span, in the window's order."""
        return [(source.files[span.file].first_row + span.first_row, span.num_rows) for span in self.spans]


class WindowList(Sequence[Window]):
    """An immutable list of windows."""

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        sources, keys, sizes, ends = [], [], [], [0]
        spans: list[Span] = []
        for window in windows:
            sources.append(window.source)
            keys.append(window.key.encode())
            sizes.append(window.num_rows)
            spans += window.spans
            ends.append(len(spans))
        self.sources: Int64 = np.array(sources, dtype=np.int32).astype(np.int64)
        """(windows,) the source of each."""
        self.num_rows: Int64 = np.array(sizes, dtype=np.int64)
        """(windows,) rows of each."""
        self._keys = np.array(keys, dtype="S")
        self._ends: Int64 = np.array(ends, dtype=np.int64)
        self._spans: Int64 = np.array(spans, dtype=np.int64).reshape(-1, len(Span._fields))

    @property
    def keys(self) -> npt.NDArray[np.bytes_]:
        """(windows,) the key of each."""
        return self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        spans = self._spans[self._ends[index] : self._ends[index + 1]].tolist()
        return Window(
            int(self.sources[index]),
            tuple(Span(*span) for span in spans),
            int(self.num_rows[index]),
            self._keys[index].decode(),
        )

    def __iter__(self) -> Iterator[Window]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WindowList) and all(
            np.array_equal(mine, theirs)
            for mine, theirs in zip(self._columns(), other._columns(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.sources, self.num_rows, self._keys, self._ends, self._spans

    def to_json(self) -> list[list[Any]]:
        """[source, rows, key, spans] of each window."""
        return [[one.source, one.num_rows, one.key, [list(span) for span in one.spans]] for one in self]

    @classmethod
    def from_json(cls, value: list[list[Any]]) -> "WindowList":
        """The list that `to_json` wrote."""
        return cls(
            Window(source, tuple(Span(*span) for span in spans), num_rows, key)
            for source, num_rows, key, spans in value
        )
