"""The data formats, by the `type` of a dataset: what a row holds, and what of it is trained.

A format is a module with one `Format` record, and a line here.
"""

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.formats import alpaca, chat, plain, prompt_completion, segments, tokenized
from nemo_ray.data.formats.base import Format

FORMATS: dict[str, Format] = {
    "chat_template": chat.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
    "alpaca": alpaca.FORMAT,
    "input_output": segments.FORMAT,
    "completion": plain.COMPLETION,
    "pretrain": plain.PRETRAIN,
    "tokenized": tokenized.FORMAT,
}


def format_of(spec: DatasetSpec) -> Format:
    """The format of a dataset's rows."""
    return FORMATS[spec.type]
