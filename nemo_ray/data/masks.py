"""Which of a text's ids are targets: character spans to a mask over the ids of the whole text.

The tokenizer's special tokens stand in the text and among the ids in the same order, so that each is known by
its place in both. A target that begins and ends at one, or after a header whose ids are known, is found so:

    text    <|im_start|>user\\nHow?<|im_end|>\\n<|im_start|>assistant\\nLike this.<|im_end|>\\n
    known   |           |         |         |  |           |  header  |         |         |
    target                                                            ====================

Where that cannot be shown, the text between two of them is encoded with character offsets and masked by
those, as transformers does: slower, equally exact.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nemo_ray.data.packing import Int32, Int64
from nemo_ray.data.template import Rendered
from nemo_ray.data.tokenizer import LoadedTokenizer

Mask = npt.NDArray[np.uint8]

_LONGEST_HEADER = 64
_KEPT_HEADERS = 10_000


@dataclass
class _Places:
    """Where the special tokens are. Part k of the text lies between two of them, or an end of the text:

    characters [starts[k], stops[k]), ids [firsts[k], lasts[k]).
    """

    starts: list[int]
    stops: list[int]
    firsts: list[int]
    lasts: list[int]
    offsets: dict[tuple[int, int], tuple[int, Int64]] = field(default_factory=dict)
    """(first part, last part) -> see Masker._offsets: kept, since several targets may need them."""


class Masker:
    """One tokenizer's masks."""

    def __init__(self, loaded: LoadedTokenizer, cut_tokens: tuple[str, ...]) -> None:
        """`cut_tokens`: see LoadedTokenizer."""
        self._loaded = loaded
        self._headers: dict[str, list[int]] = {}
        self._finds = re.compile("|".join(map(re.escape, cut_tokens))).finditer if cut_tokens else None
        vocabulary = loaded.tokenizer.token_to_id
        numbers = [number for token in cut_tokens if (number := vocabulary(token)) is not None]
        # Larger ids are clipped to the last entry, which is no token's.
        self._is_cut = np.zeros(max(numbers, default=0) + 2, dtype=bool)
        self._is_cut[numbers] = True

    def mask(self, text: Rendered, ids: Int32) -> Mask:
        """(n,) 1 for each of the text's ids (n,) that holds a character of a target."""
        mask = np.zeros(len(ids), dtype=np.uint8)
        if text.targets == ((0, len(text.text)),):
            mask[:] = 1
        elif text.targets:
            places = self._places(text.text, ids)
            for start, stop in text.targets:
                first, last = self._find(text.text, ids, places, start, stop)
                mask[first:last] = 1
        return mask

    def _places(self, text: str, ids: Int32) -> _Places:
        """No tokens are known where the text has others than the ids, or more of them."""
        if self._finds is not None:
            spans = [match.span() for match in self._finds(text)]
            found = np.flatnonzero(self._is_cut.take(ids, mode="clip")).tolist()
            # Each such id stands for an occurrence, so equal numbers are the same ones in the same order.
            if len(found) == len(spans):
                return _Places(
                    [0, *(stop for _, stop in spans)],
                    [*(start for start, _ in spans), len(text)],
                    [0, *(place + 1 for place in found)],
                    [*found, len(ids)],
                )
        return _Places([0], [len(text)], [0], [len(ids)])

    def _find(self, text: str, ids: Int32, places: _Places, start: int, stop: int) -> tuple[int, int]:
        """[first, last) ids of the characters [start, stop)."""
        begin = bisect_right(places.starts, start) - 1  # the last part that begins at `start` or before
        end = bisect_left(places.stops, stop)  # the first that ends at `stop` or after
        first = self._first(text, ids, places, begin, start)
        last = places.lasts[end] if places.stops[end] == stop else None
        if last is None and places.starts[end] == stop:
            last = places.firsts[end]
        if first is not None and last is not None:
            return first, last
        return self._by_offsets(text, ids, places, (begin, end), start, stop)

    def _first(self, text: str, ids: Int32, places: _Places, part: int, start: int) -> int | None:
        """The id that begins at `start`, at a special token or after a header in a part of the text."""
        first = places.firsts[part]
        if places.starts[part] == start:
            return first
        if places.stops[part] == start:
            return places.lasts[part]
        size = start - places.starts[part]
        if size > _LONGEST_HEADER or places.stops[part] < start or not self._loaded.byte_exact:
            return None
        header = self._header(text[places.starts[part] : start])
        return first + len(header) if ids[first : first + len(header)].tolist() == header else None

    def _header(self, text: str) -> list[int]:
        ids = self._headers.get(text)
        if ids is None:
            ids = self._loaded.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._headers) < _KEPT_HEADERS:
                self._headers[text] = ids
        return ids

    def _by_offsets(
        self, text: str, ids: Int32, places: _Places, parts: tuple[int, int], start: int, stop: int
    ) -> tuple[int, int]:
        """From the first to the last id that holds a character of [start, stop), within the parts."""
        known = places.offsets.get(parts)
        if known is None:
            known = places.offsets[parts] = self._offsets(text, ids, places, parts)
        first, offsets = known
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        return (first + int(inside[0]), first + int(inside[-1]) + 1) if inside.size else (0, 0)

    def _offsets(self, text: str, ids: Int32, places: _Places, parts: tuple[int, int]) -> tuple[int, Int64]:
        """The first id of the parts and (ids, 2) characters of all their ids; of the whole text, where the
        parts have other ids by themselves."""
        first, last = places.firsts[parts[0]], places.lasts[parts[1]]
        base, stop = places.starts[parts[0]], places.stops[parts[1]]
        encoding = self._loaded.untrimmed.encode(text[base:stop], add_special_tokens=False)
        if encoding.ids != ids[first:last].tolist():
            first = base = 0
            encoding = self._loaded.untrimmed.encode(text, add_special_tokens=False)
        return first, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + base
