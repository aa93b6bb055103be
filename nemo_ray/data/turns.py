"""Which text of a chat is trained, and in which rendering: a chat to one or more `Rendered`.

What is trained must be what is served: a turn is a target only in the text that the template writes for the
chat up to that turn. Most templates only append, and one rendering of the whole chat holds every turn so. A
template that rewrites earlier turns (Nemotron's drops their reasoning once a user asks again) gives one
rendering for each run of turns that it leaves as they were:

    turns                user  answer 1 | user  answer 2  tool  answer 3
    first rendering      user  ANSWER 1
    second rendering     user  answer 1'  user  ANSWER 2  tool  ANSWER 3        (answer 1' lost its reasoning)

Where in the text a turn is comes from the template's generation marks; else from what an assistant's turn
adds to the text, after the generation prompt; for other roles, and for parts of a turn, from marks put around
the turn's content. Each way is checked, and a row for which it does not hold is rejected by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from nemo_ray.data.template import PROMPT, ChatTemplate, Rendered, RowError, read_marks

Spans = tuple[tuple[int, int], ...]
EndRule = Literal["all", "turn", "last", "none"]

_OPEN, _CLOSE = "\ufdd2", "\ufdd3"
"""Stand around a turn's content, to find it in the text. Unicode's non-characters, as template.py's are."""

REWRITES = "the template rewrites earlier turns"


@dataclass(frozen=True)
class Chat:
    """A row's conversation as templates want it."""

    messages: Sequence[dict[str, Any]]
    tools: list[Any] | None = None
    trained: tuple[int, ...] | None = None
    """Numbers of the trained messages, ascending; None: all of the assistant's."""
    parts: Mapping[int, Spans] = field(default_factory=dict)
    """Message -> the character spans of its content that are trained, where it is not the whole turn."""


@dataclass(frozen=True)
class Ends:
    """What ends a turn, and whether that is trained."""

    tokens: tuple[str, ...]
    """Special tokens: without marks, white space after one of them is no part of a turn."""
    rules: tuple[tuple[str, EndRule], ...] = ()
    """(token, rule): where a rule is given it wins over marks."""


@dataclass
class _Run:
    """One rendering and its targets so far."""

    text: str
    targets: list[tuple[int, int]]


@dataclass(frozen=True)
class TurnFinder:
    """A template and the rules by which its turns are found and trained."""

    template: ChatTemplate
    ends: Ends

    def render(self, chat: Chat) -> list[Rendered]:
        """The chat's renderings, with their targets; none of them is without one. Raises RowError."""
        if self.template.marked and self.template.appends and chat.trained is None:
            found = [read_marks(self.template.render(chat.messages, chat.tools))]
        else:
            found = _Walk(self.template, chat, self.ends.tokens).renderings()
        found = apply_rules([one for one in found if one.targets], self.ends.rules)
        if not found:
            raise RowError("no trained tokens", "the template writes no text for the trained turns")
        return found

    def whole(self, chat: Chat) -> Rendered:
        """The chat as one text that is a target from end to end. Raises RowError."""
        text = read_marks(self.template.render(chat.messages, chat.tools)).text
        return Rendered(text, ((0, len(text)),))


def apply_rules(found: list[Rendered], rules: Sequence[tuple[str, EndRule]]) -> list[Rendered]:
    """A row's renderings with end tokens trained as the rules say; those left without a target are gone."""
    for token, rule in rules:
        found = [_apply(one, token, rule) for one in found]
        if rule == "last" and found:
            *others, last = found
            head, tail = last.targets[:-1], last.targets[-1:]
            stripped = _apply(last._replace(targets=head), token, "none")
            found = [_apply(one, token, "none") for one in others]
            found.append(stripped._replace(targets=(*stripped.targets, *tail)))
        found = [one for one in found if one.targets]
    return found


def _apply(one: Rendered, token: str, rule: EndRule) -> Rendered:
    """The targets with the token added to those that it follows, or taken from those that it ends."""
    text = one.text
    targets: list[tuple[int, int]] = []
    for start, stop in one.targets:
        if rule == "none":
            kept = text[start:stop].rstrip()
            stop = start + len(kept) - len(token) if kept.endswith(token) else stop
            targets += [(start, stop)] if start < stop else []
        else:
            targets += [(start, stop), *_end_after(text, stop, (token,))]
    place = text.find(token) if rule == "all" else -1
    while place >= 0:
        targets.append((place, place + len(token)))
        place = text.find(token, place + len(token))
    return one._replace(targets=_joined(targets))


def _end_after(text: str, stop: int, tokens: tuple[str, ...]) -> list[tuple[int, int]]:
    """The span from `stop` to the end of an end token that follows, white space between; or none."""
    place = stop
    while place < len(text) and text[place].isspace():
        place += 1
    token = next((token for token in tokens if text.startswith(token, place)), None)
    return [] if token is None else [(place, place + len(token))]


def _joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Ascending, with those that touch or overlap made one."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


class _Walk:
    """One chat, turn by turn."""

    def __init__(self, template: ChatTemplate, chat: Chat, ends: tuple[str, ...]) -> None:
        self._template = template
        self._chat = chat
        self._ends = ends
        self._known: dict[int, Rendered] = {}

    @cached_property
    def _trained(self) -> tuple[int, ...]:
        if self._chat.trained is not None:
            return self._chat.trained
        roles = (message["role"] for message in self._chat.messages)
        return tuple(index for index, role in enumerate(roles) if role == "assistant")

    def renderings(self) -> list[Rendered]:
        runs: list[_Run] = []
        for index in self._trained:
            text, spans = self._upto(index + 1).text, self._turn(index)
            if not spans:
                continue
            run = runs[-1] if runs else None
            if run is not None and text.startswith(run.text) and run.targets[-1][1] <= spans[0][0]:
                run.text = text
                run.targets += spans
            else:
                runs.append(_Run(text, list(spans)))
        if runs:
            whole = self._upto(len(self._chat.messages)).text
            if whole.startswith(runs[-1].text):
                runs[-1].text = whole
        return [Rendered(run.text, _joined(run.targets)) for run in runs]

    def _upto(self, count: int) -> Rendered:
        """The first `count` messages, with the template's marks as targets."""
        if count not in self._known:
            marked = self._template.render(self._chat.messages[:count], self._chat.tools)
            self._known[count] = read_marks(marked)
        return self._known[count]

    def _turn(self, index: int) -> Spans:
        """Where message `index` is trained, in the text up to it."""
        if index in self._chat.parts or self._chat.messages[index]["role"] != "assistant":
            return self._by_content(index)
        return self._by_marks(index) if self._template.marked else self._by_prompt(index)

    def _by_marks(self, index: int) -> Spans:
        """The marks that the message adds."""
        before, after = self._upto(index).text if index else "", self._upto(index + 1)
        if not after.text.startswith(before):
            raise RowError(REWRITES, f"at message {index}")
        return tuple((start, stop) for start, stop in after.targets if start >= len(before))

    def _by_prompt(self, index: int) -> Spans:
        """What an assistant's message adds to the text, less its header.

        The header is what the generation prompt writes, as far as the message begins with it. The chat before
        the message must be a beginning of the text, else the answer would be trained in a context that the
        template never writes.
        """
        before, prompt = self._asked(index)
        after = self._upto(index + 1).text
        if not (after.startswith(before) and prompt.startswith(before)):
            raise RowError(REWRITES, f"at message {index}")
        start = _common_length(prompt, after)
        if start == len(before) < len(prompt):
            raise RowError("the template's generation prompt does not fit", f"at message {index}")
        trimmed = after.rstrip()
        stop = len(trimmed) if trimmed.endswith(self._ends) else len(after)
        return ((start, stop),) if stop > start else ()

    def _asked(self, index: int) -> tuple[str, str]:
        """The text before message `index`, without and with the generation prompt."""
        messages, tools = self._chat.messages[:index], self._chat.tools
        text = self._template.render(messages, tools, prompt=True)
        if not self._template.prompts:
            return self._upto(index).text, read_marks(text).text
        before, *prompts = text.split(PROMPT)
        if len(prompts) != 1:
            raise RowError("the chat template's marks are broken", "U+FDD4 stands in the row")
        before = read_marks(before).text
        return before, before + read_marks(prompts[0]).text

    def _by_content(self, index: int) -> Spans:
        """The content's trained characters, found by marks around them, and the token that ends the turn."""
        content = self._chat.messages[index].get("content")
        if not isinstance(content, str):
            raise RowError("a trained turn has no text", f"at message {index}")
        text = self._upto(index + 1).text
        lead = len(content) - len(content.lstrip())
        core = (lead, max(lead, len(content.rstrip())))
        given = self._chat.parts.get(index, ((0, len(content)),))
        # The template may trim the content: marks at its ends would be in the way.
        for spans in (given, _inside(given, core)):
            found = self._marked_content(index, content, spans, text)
            if found is not None:
                targets, end = found
                return (*targets, *_end_after(text, end, self._ends))
        raise RowError("the template changes a trained turn's text", f"at message {index}")

    def _marked_content(self, index: int, content: str, spans: Spans, text: str) -> tuple[Spans, int] | None:
        """(targets, the content's end) in the text up to the message, or None where marks change the text.

        The last pair of marks is put around nothing, where the content ends.
        """
        tail = len(content.rstrip()) if spans and spans[-1][1] <= len(content.rstrip()) else len(content)
        places = [place for span in spans for place in span] + [tail, tail]
        pieces = [content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True)]
        marks = [_OPEN, _CLOSE] * (len(spans) + 1)
        marked = pieces[0] + "".join(mark + piece for mark, piece in zip(marks, pieces[1:], strict=True))
        changed = [*self._chat.messages[:index], {**self._chat.messages[index], "content": marked}]
        rendered = read_marks(self._template.render(changed, self._chat.tools)).text
        parts = rendered.replace(_CLOSE, _OPEN).split(_OPEN)
        if "".join(parts) != text or len(parts) != len(marks) + 1:
            return None
        stops = [0]
        for part in parts:
            stops.append(stops[-1] + len(part))
        found = [(stops[2 * number + 1], stops[2 * number + 2]) for number in range(len(spans) + 1)]
        return tuple(span for span in found[:-1] if span[0] < span[1]), found[-1][0]


def _inside(spans: Spans, bounds: tuple[int, int]) -> Spans:
    """The parts of the spans that lie within the bounds."""
    clipped = ((max(start, bounds[0]), min(stop, bounds[1])) for start, stop in spans)
    return tuple((start, stop) for start, stop in clipped if start < stop)


def _common_length(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    if second.startswith(first):
        return len(first)
    return next(
        index for index, pair in enumerate(zip(first, second + "\0", strict=False)) if pair[0] != pair[1]
    )
