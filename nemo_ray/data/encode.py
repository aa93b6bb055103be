"""Texts to samples: token ids and which of them are targets.

What a row's text is, and what of it is trained, is said by its format (formats/). A text is encoded in pieces
that are cut where cutting changes no id (next to special tokens), so that a piece is a target wholly, or not
at all, or after a header whose ids are known. Where that cannot be shown, the piece is encoded with character
offsets and masked by them, as transformers does: slower, equally exact.

    <|im_start|>user\\nHow?<|im_end|>\\n<|im_start|> | assistant\\nLike this.<|im_end|> | \\n
                       none                          header      target                  none
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from nemo_ray.data.packing import Int32
from nemo_ray.data.template import Rendered, RowError
from nemo_ray.data.tokenizer import LoadedTokenizer

Mask = npt.NDArray[np.uint8]
Spans = tuple[tuple[int, int], ...]

_NUM_PROVEN = 2
"""Rows of each batch that are encoded whole as well, to see that cutting changes nothing."""

_LONGEST_HEADER = 64


class Sample(NamedTuple):
    """One document's tokens: ids (n,) int32, targets (n,) 0 or 1."""

    ids: Int32
    targets: Mask


class Piece(NamedTuple):
    """Part of a row's text, encoded by itself; `targets` are character spans in it."""

    text: str
    targets: Spans


def cut(rendered: Rendered, cut_tokens: tuple[str, ...]) -> list[Piece]:
    """Cut the text as near before the targets' ends as cut tokens allow; the pieces joined are the text."""
    text = rendered.text
    cuts = [0]
    if cut_tokens:
        for boundary in (position for span in rendered.targets for position in span):
            last = cuts[-1]
            if text.endswith(cut_tokens, last, boundary) or text.startswith(cut_tokens, boundary):
                place = boundary
            else:
                ends = ((text.rfind(token, last, boundary), len(token)) for token in cut_tokens)
                place = max((start + length for start, length in ends if start >= 0), default=last)
            if last < place < len(text):
                cuts.append(place)
    pieces = []
    following = 0  # the first target that does not end before the piece
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        inside = []
        at = following
        while at < len(rendered.targets) and rendered.targets[at][0] < stop:
            first, last = rendered.targets[at]
            inside.append((max(first, start) - start, min(last, stop) - start))
            at += 1
        following = at - 1 if inside and rendered.targets[at - 1][1] > stop else at
        pieces.append(Piece(text[start:stop], tuple(inside)))
    return pieces


RowReader = Callable[[Any], Sequence[Rendered | Sample]]
"""What a row (decoded JSON or parquet) becomes; raises RowError. One for each data format."""


@dataclass
class Encoder:
    """Turns one source's rows into samples."""

    loaded: LoadedTokenizer
    read: RowReader

    def __post_init__(self) -> None:
        self._headers: dict[str, list[int]] = {}
        self.cut_tokens = self.loaded.cut_tokens

    def encode(self, rows: Iterable[Any | RowError]) -> list[list[Sample] | RowError]:
        """For each row its samples, at least one, or the reason why there is none."""
        found = [row if isinstance(row, RowError) else self._read(row) for row in rows]
        texts = [part for row in found if not isinstance(row, RowError) for part in row]
        samples = iter(self._encode([part for part in texts if isinstance(part, Rendered)]))
        results: list[list[Sample] | RowError] = []
        for row in found:
            if isinstance(row, RowError):
                results.append(row)
                continue
            made = [next(samples) if isinstance(part, Rendered) else part for part in row]
            trained = [sample for sample in made if sample.targets[1:].any()]
            results.append(trained or RowError("no trained tokens"))
        return results

    def _read(self, row: Any) -> Sequence[Rendered | Sample] | RowError:
        try:
            found = self.read(row)
            for part in found:
                if isinstance(part, Rendered):
                    _check_encodable(part.text)
            return found
        except RowError as rejected:
            return rejected

    def _encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        self._prove(texts[:_NUM_PROVEN])
        cuts = [cut(text, self.cut_tokens) for text in texts]
        pieces = [piece.text for row in cuts for piece in row]
        encodings = iter(self.loaded.tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        samples = []
        for text, row in zip(texts, cuts, strict=True):
            sample = self._join(row, [next(encodings) for _ in row])
            samples.append(self._frame(sample, text) if text.framed else sample)
        return samples

    def _frame(self, sample: Sample, text: Rendered) -> Sample:
        """Put the tokenizer's own special tokens around a text, and eos after it: trained where it is."""
        before, after = self.loaded.frame
        eos = self.loaded.eos_id
        last = after[-1] if after else int(sample.ids[-1]) if len(sample.ids) else None
        if eos is not None and last != eos:
            after = [*after, eos]
        starts = bool(text.targets) and text.targets[0][0] == 0
        stops = bool(text.targets) and text.targets[-1][1] == len(text.text)
        ids = np.concatenate([np.array(before, np.int32), sample.ids, np.array(after, np.int32)])
        flags = [np.full(len(before), starts), sample.targets, np.full(len(after), stops)]
        return Sample(ids, np.concatenate(flags).astype(np.uint8))

    # -- text to ids ------------------------------------------------------------------------------

    def _join(self, pieces: Sequence[Piece], encodings: Sequence[Encoding]) -> Sample:
        ids: list[int] = []
        mask = bytearray()
        for piece, encoding in zip(pieces, encodings, strict=True):
            piece_ids = encoding.ids
            ids += piece_ids
            mask += self._mask(piece, piece_ids)
        return Sample(np.array(ids, dtype=np.int32), np.frombuffer(bytes(mask), dtype=np.uint8))

    def _mask(self, piece: Piece, ids: list[int]) -> bytes:
        """One byte for each id of the piece: 1 where it is a target."""
        if not piece.targets:
            return bytes(len(ids))
        (start, stop), *more = piece.targets
        if not more and stop == len(piece.text):
            if start == 0:
                return b"\1" * len(ids)
            if start <= _LONGEST_HEADER and self.loaded.byte_exact:
                header = self._header(piece.text[:start])
                if ids[: len(header)] == header:
                    return bytes(len(header)) + b"\1" * (len(ids) - len(header))
        return _mask_by_offsets(
            self.loaded.untrimmed.encode(piece.text, add_special_tokens=False), piece.targets
        )

    def _header(self, text: str) -> list[int]:
        ids = self._headers.get(text)
        if ids is None:
            ids = self.loaded.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._headers) < 10_000:
                self._headers[text] = ids
        return ids

    def _prove(self, rows: Sequence[Rendered]) -> None:
        """Give up cutting if a row cut into pieces does not encode to what the whole row encodes to."""
        tokenizer = self.loaded.tokenizer
        for row in rows:
            pieces = [piece.text for piece in cut(row, self.cut_tokens)]
            if len(pieces) == 1:
                continue
            encodings = tokenizer.encode_batch_fast([row.text, *pieces], add_special_tokens=False)
            if encodings[0].ids != [token for encoding in encodings[1:] for token in encoding.ids]:
                self.cut_tokens = ()


def _check_encodable(text: str) -> None:
    """JSON can hold halves of characters (lone surrogates), which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("invalid Unicode", str(error)) from None


def _mask_by_offsets(encoding: Encoding, targets: Spans) -> bytes:
    """Tokens from the first to the last one that holds a character of a target are targets."""
    mask = bytearray(len(encoding.ids))
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    for start, stop in targets:
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        if inside.size:
            first, last = int(inside[0]), int(inside[-1])
            mask[first : last + 1] = b"\1" * (last + 1 - first)
    return bytes(mask)
