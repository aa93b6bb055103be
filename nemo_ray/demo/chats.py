"""Question and answer chats made from the library's documentation.

Owns the rows of `chats.jsonl` and `chats-heldout.jsonl`, `{"messages": [...]}`. Which question an
object gets follows from a hash of its name, so that a row depends on nothing but its object and the
objects it lists. Answers are the documentation itself, with the signature, place or parameters that
the question asks for; no two answers are the same.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nemo_ray.demo import questions
from nemo_ray.demo.library import Library, stable_hash
from nemo_ray.demo.source import Documented, squeezed

Messages = list[dict[str, str]]

_LONGEST_ANSWER = 400  # characters of documentation: a paragraph or two, as one answers a question
_LISTED_MEMBERS = 8
_SYSTEM_SHARE = 6  # one row in so many has a system turn


@dataclass
class _Book:
    """Rows so far, and the answers that must not come again."""

    rows: list[dict[str, Messages]] = field(default_factory=list)
    answers: set[str] = field(default_factory=set)

    def add(self, key: str, turns: list[tuple[str, str]]) -> None:
        """Append a chat unless one of its answers was given before."""
        answers = [answer for _, answer in turns]
        if any(answer in self.answers for answer in answers):
            return
        self.answers.update(answers)
        messages: Messages = []
        if stable_hash("system", key) % _SYSTEM_SHARE == 0:
            messages.append({"role": "system", "content": _pick(questions.SYSTEM_PROMPTS, "prompt", key)})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        self.rows.append({"messages": messages})


def chat_rows(library: Library) -> tuple[list[dict[str, Messages]], list[dict[str, Messages]]]:
    """(training rows, held-out rows), each in an order given by a hash of the row's object."""
    book, held_out = _Book(), _Book()
    members = _by_owner(library.objects)
    seen: set[str] = set()
    for item in _shuffled(library.objects):
        if item.module.startswith("encodings."):
            continue  # a hundred code pages that say the same
        doc = squeezed(item.doc)
        if item.public and item.path and _worth_asking(doc) and doc not in seen:
            seen.add(doc)
            _ask_object(book, item, members)
        if item.public and item.kind == "class":
            _ask_members(book, item, members)
        elif item.public and item.kind == "module":
            _ask_module(book, item, members)
    for name, text in library.topics:
        book.add(name, [(_ask(questions.TOPIC, name, name=name), trim(text, _LONGEST_ANSWER))])
    book.rows.sort(key=lambda row: stable_hash("order", row["messages"][-1]["content"]))
    held_out.answers.update(book.answers)
    for item in _shuffled(library.held_out):
        _ask_object(held_out, item, {})
    return book.rows, held_out.rows


def trim(doc: str, limit: int) -> str:
    """The leading paragraphs of `doc` within `limit` characters; a longer first one is cut at a line."""
    if len(doc) <= limit:
        return doc
    kept = ""
    for paragraph in doc.split("\n\n"):
        if len(kept) + len(paragraph) > limit:
            break
        kept += paragraph + "\n\n"
    if len(kept) < limit // 3:
        kept = doc[:limit].rpartition("\n")[0] or doc[:limit].rpartition(" ")[0]
    return kept.strip().removesuffix(":").strip()


def summary(doc: str) -> str:
    """The first sentence of `doc` on one line, at most 160 characters."""
    first = squeezed(doc.split("\n\n")[0])
    sentence = re.split(r"(?<=[a-z)`'\"]\.)\s+(?=[A-Z`])", first)[0]
    return sentence if len(sentence) <= 160 else sentence[:160].rpartition(" ")[0] + " ..."


def _ask_object(book: _Book, item: Documented, members: dict[str, list[Documented]]) -> None:
    """One chat about a documented object, single or with a second turn."""
    key = item.name
    doc = trim(item.doc, _LONGEST_ANSWER)
    signature = f"`{item.name}{item.signature}`"
    place = f"`{item.name}` is a {item.kind} {_place(item)}."
    placed, signed = f"{place}\n\n{doc}", f"{signature}\n\n{doc}"
    listed = _parameter_list(item)
    draw = stable_hash("style", key) % 100
    if item.kind == "class" and len(members.get(item.name, ())) >= 2 and draw < 25:
        overview = f"`{item.name}` has these members:\n\n{_listing(members[item.name])}"
        turns = [
            (_about(questions.WHAT, item), placed),
            (_pick(questions.THEN_MEMBERS, "then", key), overview),
        ]
    elif listed and draw < 12:
        turns = [(_about(questions.PARAMETERS, item), listed), (_pick(questions.THEN_WHAT, "then", key), doc)]
    elif listed and draw < 22:
        turns = [
            (_about(questions.WHAT, item), placed),
            (_pick(questions.THEN_PARAMETERS, "then", key), listed),
        ]
    elif listed and draw < 34:
        turns = [(_about(questions.PARAMETERS, item), f"{listed}\n\n{doc}")]
    elif draw < 44 and len(summary(item.doc)) >= 40 and item.path != summary(item.doc):
        turns = [(_about(questions.LOOKUP, item), f"That is {signature}.\n\n{doc}")]
    elif draw < 60 and item.signature:
        turns = [(_about(questions.USAGE, item), signed)]
    elif draw < 75:
        turns = [(_about(questions.WHERE, item), placed)]
    else:
        turns = [(_about(questions.WHAT, item), placed)]
    book.add(key, turns)


def _ask_members(book: _Book, item: Documented, members: dict[str, list[Documented]]) -> None:
    """What a class offers, for those with several documented members."""
    if len(members.get(item.name, ())) >= 3:
        head = f"`{item.name}` is a class of the module `{item.module}`."
        about = f" {summary(item.doc)}" if item.doc else ""
        answer = f"{head}{about}\n\n{_listing(members[item.name])}"
        book.add(f"{item.name} members", [(_about(questions.MEMBERS, item), answer)])


def _ask_module(book: _Book, item: Documented, members: dict[str, list[Documented]]) -> None:
    """What a module is for and what it contains: one chat, or two turns of one."""
    inside = members.get(item.name, [])
    turns: list[tuple[str, str]] = []
    if _worth_asking(item.doc):
        turns.append((_about(questions.MODULE, item), trim(item.doc, _LONGEST_ANSWER)))
    if len(inside) >= 2:
        answer = f"The module `{item.name}` offers, among others:\n\n{_listing(inside)}"
        turns.append((_about(questions.CONTENTS, item), answer))
    if len(turns) == 2 and stable_hash("split", item.name) % 2:
        book.add(item.name, turns[:1])
        turns = turns[1:]
    if turns:
        book.add(f"{item.name} contents", turns)


def _by_owner(objects: Iterable[Documented]) -> dict[str, list[Documented]]:
    """Documented public members of each class and module, in source order."""
    owners: dict[str, list[Documented]] = {}
    for item in objects:
        if item.public and item.path and _worth_asking(item.doc):
            owners.setdefault(_owner(item), []).append(item)
    return owners


def _owner(item: Documented) -> str:
    """Full name of the class or module that holds the object."""
    if item.parent:
        return item.parent if item.module == "builtins" else f"{item.module}.{item.parent}"
    return item.module


def _place(item: Documented) -> str:
    return f"of the class `{_owner(item)}`" if item.parent else f"in the module `{item.module}`"


def _listing(items: list[Documented]) -> str:
    """A list of names with their summaries; what is left out is counted."""
    lines = [f"- `{item.path.rpartition('.')[2]}`: {summary(item.doc)}" for item in items[:_LISTED_MEMBERS]]
    left = len(items) - len(lines)
    return "\n".join([*lines, f"- and {left} more"] if left else lines)


def _parameter_list(item: Documented) -> str:
    """A sentence and a list of parameters with defaults; "" with fewer than two of them."""
    if len(item.parameters) < 2:
        return ""
    lines = []
    for parameter in item.parameters:
        notes = [f"default `{parameter.default}`"] if parameter.default is not None else []
        if parameter.keyword_only:
            notes.append("keyword only")
        if parameter.star:
            notes.append("further keyword arguments" if parameter.star == "**" else "further arguments")
        lines.append(f"- `{parameter.star}{parameter.name}`" + (f" ({', '.join(notes)})" if notes else ""))
    return f"`{item.name}` takes {len(lines)} parameters:\n\n" + "\n".join(lines)


def _worth_asking(doc: str) -> bool:
    return len(doc) >= 15 and len(doc.split()) >= 3


def _shuffled(objects: Iterable[Documented]) -> Iterator[Documented]:
    yield from sorted(objects, key=lambda item: (stable_hash("order", item.name), item.name))


def _about(templates: tuple[str, ...], item: Documented) -> str:
    return _ask(
        templates,
        item.name,
        name=item.name,
        short=item.path.rpartition(".")[2],
        owner=_owner(item),
        module=item.module,
        kind=item.kind,
        summary=summary(item.doc),
    )


def _ask(templates: tuple[str, ...], key: str, **fields: str) -> str:
    return _pick(templates, "question", key).format(**fields)


def _pick(choices: tuple[str, ...], purpose: str, key: str) -> str:
    return choices[stable_hash(purpose, key) % len(choices)]
