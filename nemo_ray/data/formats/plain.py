"""`completion` and `pretrain`: rows of plain text, all of it trained.

{"text": "All of this is trained, and the eos token after it."}
"""

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.formats.base import Field, Format, read_some_text
from nemo_ray.data.template import Rendered
from nemo_ray.data.tokenizer import LoadedTokenizer


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    def read(row: object) -> list[Rendered]:
        text = read_some_text(row, spec.field)
        return [Rendered(text, ((0, len(text)),), framed=True)]

    return read


def _format(kind: str, splits: bool) -> Format:
    return Format(
        columns=lambda spec: [spec.field],
        required=lambda spec: [Field("field", spec.field)],
        keys=TYPE_KEYS[kind],
        reader=_reader,
        splits=splits,
    )


COMPLETION = _format("completion", splits=False)
PRETRAIN = _format("pretrain", splits=True)
