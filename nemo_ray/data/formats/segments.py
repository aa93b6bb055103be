"""`input_output`: a text in segments, each trained or not. No template is used, and no token added.

    {"segments": [{"label": false, "text": "<s>Q: 3 + 4?\\nA:"}, {"label": true, "text": " 7</s>"}]}

The segments are encoded as one text; a token that holds a character of a trained segment is trained.
"""

from typing import Any

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.formats.base import Field, Format, read_field
from nemo_ray.data.template import Rendered, RowError
from nemo_ray.data.tokenizer import LoadedTokenizer


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    def read(row: object) -> list[Rendered]:
        value = read_field(row, spec.field_segments)
        if not isinstance(value, list) or not value:
            raise RowError(f"field {spec.field_segments!r} is no list of segments")
        text = ""
        targets: list[tuple[int, int]] = []
        for number, segment in enumerate(value):
            trained, part = _segment(segment, number)
            if part and (trained or train_on_inputs):
                touches = bool(targets) and targets[-1][1] == len(text)
                start = targets.pop()[0] if touches else len(text)
                targets.append((start, len(text) + len(part)))
            text += part
        if not targets:
            raise RowError("no trained tokens", "no segment with text has label: true")
        return [Rendered(text, tuple(targets))]

    return read


def _segment(segment: Any, number: int) -> tuple[bool, str]:
    if not isinstance(segment, dict):
        raise RowError("a segment is no object", f"segment {number}")
    label, text = segment.get("label"), segment.get("text")
    if not isinstance(label, (bool, int)) or label not in (0, 1):
        raise RowError("a segment's label is not true or false", f"segment {number}")
    if not isinstance(text, str):
        raise RowError("a segment has no text", f"segment {number}")
    return bool(label), text


FORMAT = Format(
    columns=lambda spec: [spec.field_segments],
    required=lambda spec: [Field("field_segments", spec.field_segments)],
    keys=TYPE_KEYS["input_output"],
    reader=_reader,
)
