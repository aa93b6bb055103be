"""What the demo's texts are made from, and which part of it is held out.

Owns: the read library, the choice of held-out objects, and the rule that nothing of them is seen in
training. It does not know how rows look: see `text.py` and `chats.py`.
"""

import ast
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_ray.demo.compiled import compiled_objects
from nemo_ray.demo.source import (
    Documented,
    comments,
    documented_objects,
    read_source,
    source_files,
    squeezed,
)

_HELD_OUT_SHARE = 0.155  # of the objects that qualify; some are given back by `_hold_out`
_SHORTEST_HELD_OUT, _LONGEST_HELD_OUT = 100, 1200  # characters of documentation
_HELD_OUT_KINDS = ("function", "method", "class", "class method", "static method", "property")


@dataclass(frozen=True)
class Library:
    """The documentation that was read: `objects` to train on, `held_out` ones, comments and topics."""

    objects: tuple[Documented, ...]
    held_out: tuple[Documented, ...]
    comments: tuple[tuple[str, str], ...]  # (module, text)
    topics: tuple[tuple[str, str], ...]  # (name, text) of the language reference that pydoc carries


def stable_hash(*parts: str) -> int:
    """A 64-bit number that depends on the strings alone: the recipe's only source of chance."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def read_library(root: Path, only: Iterable[str] | None = None) -> Library:
    """Read the standard library under `root`; `only` keeps the named modules, without held-out objects."""
    files = source_files(root)
    if only is not None:
        names = set(only)
        files = [item for item in files if item[0] in names]
    objects = _distinct(
        [*compiled_objects(), *documented_objects(files)] if only is None else documented_objects(files)
    )
    notes = [(module, text) for module, path in files for text in comments(read_source(path))]
    topics = read_topics(root)
    if only is not None:
        return Library(tuple(objects), (), tuple(notes), ())
    held_out = _hold_out(objects, [text for _, text in notes] + [text for _, text in topics])
    kept = tuple(item for item in objects if item.name not in held_out)
    left = tuple(item for item in objects if item.name in held_out)
    return Library(kept, left, tuple(dict.fromkeys(notes)), topics)


def read_topics(root: Path) -> tuple[tuple[str, str], ...]:
    """The language reference's topics, which the library carries for `help()`, sorted by name."""
    tree = ast.parse(read_source(root / "pydoc_data" / "topics.py"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics: dict[str, str] = ast.literal_eval(node.value)
            return tuple(sorted((name, text.strip()) for name, text in topics.items()))
    raise ValueError(f"{root}/pydoc_data/topics.py assigns no `topics`")


def _distinct(objects: Iterable[Documented]) -> list[Documented]:
    """Drop later objects with a name that was seen: modules may stand under one public name."""
    return list({item.name: item for item in reversed(list(objects))}.values())[::-1]


def _hold_out(objects: list[Documented], other_texts: list[str]) -> frozenset[str]:
    """Names of objects whose documentation, and its first paragraph, occurs nowhere else.

    Candidates are drawn by a hash of the name. One that is quoted elsewhere goes back to the
    training part, which may quote another candidate: repeat until none is found.
    """
    chosen = {
        item.name: (squeezed(item.doc), squeezed(item.doc.split("\n\n")[0]))
        for item in objects
        if item.public
        and item.kind in _HELD_OUT_KINDS
        and _SHORTEST_HELD_OUT <= len(item.doc) <= _LONGEST_HELD_OUT
        and stable_hash("held out", item.name) < _HELD_OUT_SHARE * 2**64
    }
    others = "\n".join(squeezed(text) for text in other_texts)
    while True:
        training = "\n".join([others, *(squeezed(item.doc) for item in objects if item.name not in chosen)])
        quoted = [name for name, pieces in chosen.items() if any(p in training for p in pieces)]
        if not quoted:
            return frozenset(chosen)
        for name in quoted:
            del chosen[name]
