"""`tokenized`: rows of token ids, as another program left them.

    {"input_ids": [1, 10, 11, 2], "labels": [-100, -100, 11, 2], "attention_mask": [1, 1, 1, 1]}

A label is its token's id (trained) or -100 (not). Padding, where the attention mask is 0 at the ends, is cut.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader, Sample
from nemo_ray.data.formats.base import Field, Format, read_field
from nemo_ray.data.packing import IGNORED
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import LoadedTokenizer

_IDS, _LABELS, _MASK = "input_ids", "labels", "attention_mask"


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    vocabulary = loaded.num_ids

    def read(row: Any) -> list[Sample]:
        ids, labels = _numbers(row, _IDS), _numbers(row, _LABELS)
        if len(ids) != len(labels):
            raise RowError(f"{_LABELS!r} is not as long as {_IDS!r}", f"{len(labels)} and {len(ids)}")
        if row.get(_MASK) is not None:
            kept = _unpadded(_numbers(row, _MASK), len(ids))
            ids, labels = ids[kept], labels[kept]
        wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
        if wrong.size:
            place = int(wrong[0])
            raise RowError(
                "a token id is not in the vocabulary", f"{ids[place]} at {place}, {vocabulary:,} tokens"
            )
        targets = labels != IGNORED
        wrong = np.flatnonzero(targets & (labels != ids))
        if wrong.size:
            place = int(wrong[0])
            raise RowError(
                "a label is neither its token's id nor -100",
                f"label {labels[place]} of token {ids[place]} at {place}",
            )
        return [Sample(ids.astype(np.int32), targets.astype(np.uint8))]

    return read


def _numbers(row: Any, name: str) -> npt.NDArray[np.int64]:
    value = read_field(row, name)
    try:
        numbers = np.asarray(value) if isinstance(value, (list, np.ndarray)) and len(value) else None
    except (ValueError, OverflowError):  # lists of several lengths, numbers of no size that there is
        numbers = None
    if numbers is None or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise RowError(f"field {name!r} is no list of whole numbers")
    return numbers.astype(np.int64)


def _unpadded(mask: npt.NDArray[np.int64], size: int) -> slice:
    """The tokens between the padding at both ends."""
    if len(mask) != size:
        raise RowError(f"{_MASK!r} is not as long as {_IDS!r}", f"{len(mask)} and {size}")
    seen = np.flatnonzero(mask)
    if not seen.size:
        raise RowError(f"{_MASK!r} hides every token")
    first, last = int(seen[0]), int(seen[-1])
    if last - first + 1 != seen.size:
        raise RowError(f"{_MASK!r} hides tokens between others")
    return slice(first, last + 1)


FORMAT = Format(
    columns=lambda spec: [_IDS, _LABELS, _MASK],
    required=lambda spec: [Field(None, _IDS), Field(None, _LABELS)],
    keys=TYPE_KEYS["tokenized"],
    reader=_reader,
)
