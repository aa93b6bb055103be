"""Chat templates: jinja2 in a sandbox, as transformers renders them, with the assistant's text marked.

Owns messages -> `Rendered` (text and the character spans of targets). Encoding is encode.py's.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_ray.errors import ConfigError

OPENING, CLOSING = "\ufdd0", "\ufdd1"
"""Stand in the rendered text for a mark's two ends. Unicode's non-characters: no text holds them."""

_MARKS = re.compile(f"[{OPENING}{CLOSING}]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class RowError(Exception):
    """A row that cannot become a sample: rows are counted by `reason`, a short phrase."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Rendered(NamedTuple):
    """A conversation as text; `targets` are disjoint ascending character spans [start, stop)."""

    text: str
    targets: tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: renders its body between the two mark characters."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPENING}{caller()}{CLOSING}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter, without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the special tokens that it may write."""

    template: jinja2.Template
    special_tokens: dict[str, str]
    turn_ends: tuple[str, ...]
    """Without marks: white space after one of these is not trained."""
    marked: bool
    """It has `{% generation %}` marks: targets are exact. Else they are derived, see `_by_prefixes`."""

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> Rendered:
        """Text and targets of one conversation. Raises RowError."""
        if not any(message.get("role") == "assistant" for message in messages):
            raise RowError("no assistant turn")
        if self.marked:
            return _read_marks(self._text(messages, tools))
        return self._by_prefixes(messages, tools)

    def _text(self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        try:
            return self.template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # templates run whatever their author wrote
            raise RowError("the chat template fails", f"{type(error).__name__}: {error}") from None

    def _by_prefixes(self, messages: Sequence[dict[str, Any]], tools: Any) -> Rendered:
        """Targets without marks: what an assistant's message adds to the text, less its header.

        The header is what the generation prompt writes, as far as the message begins with it. Each
        beginning of the chat must be a beginning of the text, else the row is rejected: the answer would be
        trained in a context that the template never writes.
        """
        text = self._text(messages, tools)
        targets = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._text(messages[:index], tools)
            prompt = self._text(messages[:index], tools, prompt=True)
            after = self._text(messages[: index + 1], tools) if index + 1 < len(messages) else text
            if not (text.startswith(after) and after.startswith(before) and prompt.startswith(before)):
                raise RowError("the template rewrites earlier turns", f"at message {index}")
            start = _common_length(prompt, after)
            if start == len(before) < len(prompt):
                raise RowError("the template's generation prompt does not fit", f"at message {index}")
            trimmed = after.rstrip()
            stop = len(trimmed) if trimmed.endswith(self.turn_ends) else len(after)
            if stop > start:
                targets.append((start, stop))
        return Rendered(text, tuple(targets))


def _common_length(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    if second.startswith(first):
        return len(first)
    return next(
        index for index, pair in enumerate(zip(first, second + "\0", strict=False)) if pair[0] != pair[1]
    )


def _read_marks(marked: str) -> Rendered:
    """Take the mark characters out and return where they stood."""
    parts = _MARKS.split(marked)
    ends = _MARKS.findall(marked)
    if ends != [OPENING, CLOSING] * (len(ends) // 2):
        raise RowError(
            "the chat template's marks are broken", "nested, or U+FDD0 or U+FDD1 stands in the row"
        )
    targets = []
    position = 0
    for index, part in enumerate(parts):
        if index % 2 and part:
            targets.append((position, position + len(part)))
        position += len(part)
    return Rendered("".join(parts), tuple(targets))


@lru_cache(maxsize=8)
def _compile(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat_template: line {error.lineno}: {error.message}") from None


def chat_template(text: str, special_tokens: dict[str, str], turn_ends: tuple[str, ...]) -> ChatTemplate:
    """Compile a template. Raises ConfigError where it is no valid jinja."""
    return ChatTemplate(_compile(text), special_tokens, turn_ends, _GENERATION.search(text) is not None)
