"""`chat_template`: a conversation, rendered by the chat template. Messages may be in the sharegpt form too.

    {"messages": [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}]}

What the assistant says is trained; the dataset's keys may choose other turns, or parts of them.
"""

from typing import Any

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import RowReader
from nemo_ray.data.formats.base import Field, Format, read_field, read_text
from nemo_ray.data.formats.messages import MessageReader, Turn, read_tools
from nemo_ray.data.template import Rendered, RowError, chat_template
from nemo_ray.data.tokenizer import LoadedTokenizer
from nemo_ray.data.turns import Chat, EndRule, Ends, TurnFinder
from nemo_ray.errors import ConfigError

_SYSTEM = "system"


def turn_finder(spec: DatasetSpec, loaded: LoadedTokenizer) -> TurnFinder:
    """The dataset's template and rules. Raises ConfigError."""
    if loaded.chat_template is None:
        raise ConfigError(
            "chat_template: the base model's tokenizer has none; name a .jinja file, or use type: completion"
        )
    template = chat_template(loaded.chat_template, loaded.special_tokens, spec.chat_template_kwargs)
    return TurnFinder(template, _ends(spec, loaded))


def _ends(spec: DatasetSpec, loaded: LoadedTokenizer) -> Ends:
    eos = loaded.special_tokens.get("eos_token")
    if spec.train_on_eos is not None and eos is None:
        raise ConfigError(
            f"train_on_eos: {spec.train_on_eos}: the tokenizer has no eos token; remove the key"
        )
    rules: dict[str, EndRule] = {}
    if eos is not None and spec.train_on_eos is not None:
        rules[eos] = spec.train_on_eos
    elif eos is not None and spec.train_on_eot is not None and not spec.eot_tokens:
        rules[eos] = spec.train_on_eot
    for token in spec.eot_tokens:
        if loaded.tokenizer.token_to_id(token) is None:
            raise ConfigError(
                f"eot_tokens: {token!r} is no token of the base model's tokenizer; name one that is"
            )
        if token != eos or token not in rules:
            rules[token] = spec.train_on_eot or spec.train_on_eos or "turn"
    known = [*loaded.cut_tokens, *spec.eot_tokens, *([] if eos is None else [eos])]
    return Ends(tuple(dict.fromkeys(known)), tuple(rules.items()))


def _reader(spec: DatasetSpec, loaded: LoadedTokenizer, train_on_inputs: bool) -> RowReader:
    finder, chats = turn_finder(spec, loaded), _ChatReader(spec)

    def read(row: Any) -> list[Rendered]:
        chat = chats.read(row, train_on_inputs)
        return [finder.whole(chat)] if train_on_inputs else finder.render(chat)

    return read


class _ChatReader:
    """Rows to chats, by one dataset's keys."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._messages = MessageReader(spec)
        self._system = spec.field_system or _SYSTEM
        self._roles = {self._messages.roles.get(role, role) for role in spec.roles_to_train}
        self._plain = self._roles == {"assistant"} and spec.message_field_training is None

    def read(self, row: Any, train_on_inputs: bool) -> Chat:
        """The row's chat, and which turns of it are trained. Raises RowError."""
        spec = self._spec
        turns = self._messages.turns(read_field(row, spec.field_messages), spec.field_messages)
        if turns[0].message["role"] != _SYSTEM and row.get(self._system) not in (None, ""):
            turns.insert(0, Turn({"role": _SYSTEM, "content": read_text(row, self._system)}))
        if spec.drop_system_message and turns[0].message["role"] == _SYSTEM:
            turns = turns[1:]
            if not turns:
                raise RowError("only a system message, which drop_system_message leaves out")
        messages = [turn.message for turn in turns]
        tools = read_tools(row.get(spec.field_tools), spec.field_tools)
        parts = {index: turn.parts for index, turn in enumerate(turns) if turn.parts is not None}
        if train_on_inputs:
            return Chat(messages, tools)
        if self._plain and not parts:
            if not any(message["role"] == "assistant" for message in messages):
                raise RowError("no assistant turn")
            return Chat(messages, tools)
        trained = tuple(index for index, turn in enumerate(turns) if self._is_trained(turn))
        if not trained:
            raise RowError("no trained tokens", "no turn is trained")
        return Chat(messages, tools, trained, {index: parts[index] for index in trained if index in parts})

    def _is_trained(self, turn: Turn) -> bool:
        """A turn's flag wins over its parts, and those over its role."""
        if turn.trained is not None:
            return turn.trained
        return turn.message["role"] in self._roles if turn.parts is None else bool(turn.parts)


def _columns(spec: DatasetSpec) -> list[str]:
    return [spec.field_messages, spec.field_tools, spec.field_system or _SYSTEM]


FORMAT = Format(
    columns=_columns,
    required=lambda spec: [Field("field_messages", spec.field_messages)],
    keys=TYPE_KEYS["chat_template"],
    reader=_reader,
)
