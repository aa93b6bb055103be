"""A row's messages as chat templates want them: names, roles, reasoning, tool calls, and what is trained."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.template import RowError
from nemo_ray.data.turns import Spans

_ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of the sharegpt format."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning goes by; templates read the first."""

_TEXT = ("text", "content", "value")
"""Where a part of a message's content keeps its text."""


class Turn(NamedTuple):
    """One message, and what it says about its own training."""

    message: dict[str, Any]
    trained: bool | None = None
    parts: Spans | None = None
    """Trained spans of its content, where it is not the whole turn."""


class MessageReader:
    """Reads messages by one dataset's keys."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._mappings = spec.message_property_mappings
        self._renamed = set(self._mappings.values())
        self._renames = any(name != source for name, source in self._mappings.items())
        self.roles = {name: role for role, names in spec.roles.items() for name in names} or _ROLES
        self._flag = spec.message_field_training
        self._detail = spec.message_field_training_detail

    def turns(self, value: Any, name: str) -> list[Turn]:
        """The messages in `value`, a field called `name`: a list, or JSON text of one. Raises RowError."""
        value = parse_json(value, f"field {name!r}")
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(message, dict) for message in value)
        ):
            raise RowError(f"field {name!r} is no list of messages")
        return [self._turn(message) for message in value]

    def _turn(self, message: dict[str, Any]) -> Turn:
        result = self._named(message)
        parts = None
        content = result.get("content", "")
        if not isinstance(content, str):
            result["content"], parts = _join(content)
        for name in _REASONING:
            if name in result:
                result = {"thinking": result[name], **result, "reasoning_content": result[name]}
                break
        if self._detail is not None and message.get(self._detail) is not None:
            parts = _detail_spans(message[self._detail], result.get("content", ""))
        trained = None if self._flag is None else message.get(self._flag)
        if trained is not None:
            trained = read_flag(trained, f"a message's {self._flag!r}")
        return Turn(result, trained, parts)

    def _named(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message's properties by the names that templates use."""
        mappings = self._mappings
        result = {name: value for name, value in message.items() if value is not None}
        if self._renames:
            result = {name: value for name, value in result.items() if name not in self._renamed}
            for name, source in mappings.items():
                if message.get(source) is not None:
                    result[name] = message[source]
        role = result.get("role")
        if not isinstance(role, str) or not role:
            raise RowError(f"a message has no {mappings.get('role', 'role')!r}")
        result["role"] = self.roles.get(role, role)
        if "tool_calls" in result:
            result["tool_calls"] = _tool_calls(result["tool_calls"])
        elif "content" not in result:
            raise RowError(f"a message has no {mappings.get('content', 'content')!r}")
        return result


def parse_json(value: Any, what: str) -> Any:
    """`value`, or what it holds where it is JSON text. Raises RowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is no JSON", str(error)) from None


def read_tools(value: Any, name: str) -> list[Any] | None:
    """The tools in `value`, a field called `name`: objects, or JSON text of them; None: there are none."""
    value = parse_json(value, f"field {name!r}") if value != "" else None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is no list of tools")
    return [_tool(tool, name) for tool in value]


def _tool(tool: Any, name: str) -> Any:
    tool = _without_none(parse_json(tool, f"a tool in field {name!r}"))
    if not isinstance(tool, dict):
        raise RowError(f"field {name!r} is no list of tools")
    function = tool.get("function", tool)
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        function = {**function, "parameters": parse_json(function["parameters"], "a tool's parameters")}
        tool = {**tool, "function": function} if "function" in tool else function
    return tool


def _tool_calls(value: Any) -> list[Any]:
    """Calls with their arguments as objects, which templates walk over."""
    value = _without_none(parse_json(value, "a message's tool_calls"))
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise RowError("a message's tool_calls are no list of calls")
    return [_tool_call(call) for call in value]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no 'name'")
    if "arguments" in function:
        arguments = parse_json(function["arguments"], "a tool call's arguments")
        if not isinstance(arguments, dict):
            raise RowError("a tool call's arguments are no object", f"of {function['name']}")
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _without_none(value: Any) -> Any:
    """Parquet gives every object all fields that any of them has: those without a value are none."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _join(content: Any) -> tuple[str, Spans | None]:
    """Content in parts as one text; and the trained spans, where a part says whether it is trained."""
    if not isinstance(content, list):
        raise RowError("a message's content is no text")
    text, spans, flagged = "", [], False
    for part in content:
        piece, trained = (part, None) if isinstance(part, str) else _part(part)
        flagged = flagged or trained is not None
        if piece and trained is not False:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, _merged(spans) if flagged else None


def _part(part: Any) -> tuple[str, bool | None]:
    texts = [part[name] for name in _TEXT if part.get(name) is not None] if isinstance(part, dict) else []
    if not texts or not isinstance(texts[0], str):
        raise RowError("a message's content has a part that is no text")
    for name in ("train", "weight"):
        if part.get(name) is not None:
            return texts[0], read_flag(part[name], f"a part's {name!r}")
    return texts[0], None


def read_flag(value: Any, what: str) -> bool:
    """True or false, or 1 or 0. Raises RowError."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise RowError(f"{what} is not true or false")
    return bool(value)


def _detail_spans(value: Any, content: str) -> Spans:
    """Of parts given by their first and last character, those that are trained."""
    value = parse_json(value, "a message's parts")
    if not isinstance(value, list):
        raise RowError("a message's parts are no list")
    spans = sorted(_detail(part, len(content)) for part in value)
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:], strict=False)):
        raise RowError("parts of a message overlap")
    return _merged([(start, stop) for start, stop, trained in spans if trained])


def _detail(part: Any, size: int) -> tuple[int, int, bool]:
    if not isinstance(part, dict):
        raise RowError("a part of a message is no object")
    first, last = part.get("begin_offset"), part.get("end_offset")
    if type(first) is not int or type(last) is not int:
        raise RowError("a part of a message has no 'begin_offset' and 'end_offset'")
    if not 0 <= first <= last < size:
        raise RowError("a part of a message is not within its content", f"{first} to {last} of {size}")
    return first, last + 1, read_flag(part.get("train"), "a part's 'train'")


def _merged(spans: Sequence[tuple[int, int]]) -> Spans:
    """Neighbours made one."""
    result: list[tuple[int, int]] = []
    for start, stop in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)
