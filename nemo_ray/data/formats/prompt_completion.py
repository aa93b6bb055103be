"""`prompt_completion`: a prompt and what follows it, both as text or both as messages.

    {"prompt": "3 + 4 =", "completion": " 7"}
    {"prompt": [{"role": "user", "content": "3 + 4?"}], "completion": [{"role": "assistant", "content": "7"}]}

The completion is trained: of text all of it, and the eos token after it; of messages what the assistant says.
"""

from typing import Any

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.formats.base import Field, Format, read_field, read_some_text, read_text
from nemo_ray.data.formats.chat import turn_finder
from nemo_ray.data.formats.messages import MessageReader, read_tools
from nemo_ray.data.template import Rendered, RowError
from nemo_ray.data.tokenizer import LoadedTokenizer
from nemo_ray.data.turns import Chat


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    messages = MessageReader(spec)
    finder = None if loaded.chat_template is None else turn_finder(spec, loaded)

    def read(row: Any) -> list[Rendered]:
        if isinstance(read_field(row, spec.field_completion), str):
            prompt = read_text(row, spec.field_prompt)
            text = prompt + read_some_text(row, spec.field_completion)
            start = 0 if train_on_inputs else len(prompt)
            return [Rendered(text, ((start, len(text)),), framed=True)]
        if finder is None:
            raise RowError("messages, and no chat template")
        chat = _chat(spec, messages, row)
        return [finder.whole(chat)] if train_on_inputs else finder.render(chat)

    return read


def _chat(spec: DatasetSpec, messages: MessageReader, row: Any) -> Chat:
    prompt = messages.turns(read_field(row, spec.field_prompt), spec.field_prompt)
    answer = messages.turns(read_field(row, spec.field_completion), spec.field_completion)
    chat = [turn.message for turn in (*prompt, *answer)]
    trained = [index for index in range(len(prompt), len(chat)) if chat[index]["role"] == "assistant"]
    if not trained:
        raise RowError("no assistant turn", f"in field {spec.field_completion!r}")
    return Chat(chat, read_tools(row.get(spec.field_tools), spec.field_tools), tuple(trained))


FORMAT = Format(
    columns=lambda spec: [spec.field_prompt, spec.field_completion, spec.field_tools],
    required=lambda spec: [
        Field("field_prompt", spec.field_prompt),
        Field("field_completion", spec.field_completion),
    ],
    keys=TYPE_KEYS["prompt_completion"],
    reader=_reader,
)
