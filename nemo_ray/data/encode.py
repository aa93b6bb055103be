"""Texts to samples: token ids and which of them are targets.

What a row's text is, and what of it is trained, is said by its format (formats/). A text is encoded whole;
which of its ids are targets masks.py finds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nemo_ray.data.masks import Mask, Masker
from nemo_ray.data.packing import Int32
from nemo_ray.data.template import Rendered, RowError
from nemo_ray.data.tokenizer import LoadedTokenizer

_AT_ONCE = 256
"""Texts that are encoded together: what the library keeps of each token takes memory."""


class Sample(NamedTuple):
    """One document's tokens: ids (n,) int32, targets (n,) 0 or 1."""

    ids: Int32
    targets: Mask


RowReader = Callable[[Any], Sequence[Rendered | Sample]]
"""What a row (decoded JSON or parquet) becomes; raises RowError. One for each data format."""


@dataclass
class Encoder:
    """Turns one source's rows into samples."""

    loaded: LoadedTokenizer
    read: RowReader

    def __post_init__(self) -> None:
        self.masker = Masker(self.loaded, self.loaded.cut_tokens)

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
        samples = []
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            encodings = self.loaded.tokenizer.encode_batch_fast(
                [text.text for text in part], add_special_tokens=False
            )
            for text, encoding in zip(part, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                sample = Sample(ids, self.masker.mask(text, ids))
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


def _check_encodable(text: str) -> None:
    """JSON can hold halves of characters (lone surrogates), which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("invalid Unicode", str(error)) from None
