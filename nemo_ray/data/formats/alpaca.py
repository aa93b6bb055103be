"""`alpaca`: a task, perhaps with an input, and its answer, in the prompt of the Alpaca data set.

    {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7"}

The output is trained, and the eos token after it.
"""

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.formats.base import Field, Format, read_some_text, read_text
from nemo_ray.data.template import Rendered
from nemo_ray.data.tokenizer import LoadedTokenizer

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    def read(row: object) -> list[Rendered]:
        instruction = read_some_text(row, spec.field_instruction)
        output = read_some_text(row, spec.field_output)
        given = _optional(row, spec.field_input)
        text = _system(spec, row, bool(given)) + (
            spec.format.format(instruction=instruction, input=given)
            if given
            else spec.no_input_format.format(instruction=instruction)
        )
        start = 0 if train_on_inputs else len(text)
        return [Rendered(text + output, ((start, len(text) + len(output)),), framed=True)]

    return read


def _system(spec: DatasetSpec, row: object, with_input: bool) -> str:
    """What the prompt begins with: the row's, the configuration's, or Alpaca's own."""
    system = spec.system_prompt
    if spec.field_system is not None:
        system = _optional(row, spec.field_system) or system
    if system is None:
        system = _WITH_INPUT if with_input else _WITHOUT_INPUT
    return spec.system_format.format(system=system) if system else ""


def _optional(row: object, name: str) -> str:
    """A field that holds text, or empty text where there is none."""
    return read_text(row, name) if isinstance(row, dict) and row.get(name) is not None else ""


def _columns(spec: DatasetSpec) -> list[str]:
    names = [spec.field_instruction, spec.field_input, spec.field_output]
    return names if spec.field_system is None else [*names, spec.field_system]


FORMAT = Format(
    columns=_columns,
    required=lambda spec: [
        Field("field_instruction", spec.field_instruction),
        Field("field_output", spec.field_output),
    ],
    keys=TYPE_KEYS["alpaca"],
    reader=_reader,
)
