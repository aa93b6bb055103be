"""Chat templates: jinja2 in a sandbox, as transformers renders them, with the assistant's text marked.

Owns messages -> `Rendered` (text, and the character spans between the template's marks). Which turns are
trained, and on which text, is turns.py's; encoding is encode.py's.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_ray.data.template_source import appends_only, mark_prompt
from nemo_ray.errors import ConfigError

OPENING, CLOSING, PROMPT = "\ufdd0", "\ufdd1", "\ufdd4"
"""Stand in the rendered text for a mark's two ends, and before a generation prompt. Unicode's non-characters:
no text holds them."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class RowError(Exception):
    """A row that cannot become a sample: rows are counted by `reason`, a short phrase."""

    def __init__(self, reason: str, detail: str = "") -> None:
        # A detail may quote the row, whose text may be none that can be printed.
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Rendered(NamedTuple):
    """A row as text; `targets` are disjoint ascending character spans [start, stop)."""

    text: str
    targets: tuple[tuple[int, int], ...]
    framed: bool = False
    """Plain text: it stands between the tokenizer's own special tokens, and an eos token ends it."""


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
    """A compiled template, and all that it sees beside a row."""

    template: jinja2.Template
    variables: Mapping[str, Any]
    """jinja's globals, special tokens by their names, and the configuration's chat_template_kwargs."""
    marked: bool
    """It has `{% generation %}` marks: they say what an assistant's turn is."""
    appends: bool
    """Shown from its source: the text of a chat's beginning is a beginning of the chat's text."""
    prompts: bool
    """It writes PROMPT before its generation prompt, and the text without one before that."""

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, *, prompt: bool = False) -> str:
        """The text of a chat, with the mark characters in it. Raises RowError."""
        try:
            values = {**self.variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
            # What Template.render does, without a copy of the environment's globals for each row.
            return "".join(self.template.root_render_func(self.template.new_context(values, shared=True)))
        except Exception as error:  # templates run whatever their author wrote
            raise RowError("the chat template fails", f"{type(error).__name__}: {error}") from None


def read_marks(marked: str) -> Rendered:
    """Take the mark characters out and return where they stood. Raises RowError."""
    text, *marks = marked.split(OPENING)
    parts, targets, position, whole = [text], [], len(text), CLOSING not in text
    for mark in marks:
        inside, closed, outside = mark.partition(CLOSING)
        whole = whole and closed == CLOSING and CLOSING not in outside
        if inside:
            targets.append((position, position + len(inside)))
        parts += (inside, outside)
        position += len(inside) + len(outside)
    if not whole:
        raise RowError(
            "the chat template's marks are broken", "nested, or U+FDD0 or U+FDD1 stands in the row"
        )
    return Rendered("".join(parts), tuple(targets))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=16)
def _compile(text: str) -> tuple[jinja2.Template, bool, bool]:
    """The template, whether it only appends, and whether it marks its prompt."""
    environment = _environment()
    try:
        tree = environment.parse(text)
        appends, prompts = appends_only(tree), mark_prompt(tree, PROMPT)
        code = environment.compile(tree)
        return jinja2.Template.from_code(environment, code, environment.globals), appends, prompts
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat_template: line {error.lineno}: {error.message}") from None


def chat_template(
    text: str, special_tokens: Mapping[str, str], arguments: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Compile a template; `arguments` are chat_template_kwargs. Raises ConfigError where it is no jinja."""
    compiled, appends, prompts = _compile(text)
    variables = {**compiled.globals, **special_tokens, "documents": None, **(arguments or {})}
    return ChatTemplate(compiled, variables, _GENERATION.search(text) is not None, appends, prompts)
