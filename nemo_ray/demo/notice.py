"""The licence notices of the demo's assets: Python's own, and those inside the library's files."""

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_ray.demo.source import read_source

NOTICE = """\
Derived from the documentation in Python's standard library
===========================================================

The files in this folder were made by `python -m nemo_ray.demo` from the standard library of
CPython {python}, Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. They are
used and redistributed under the Python Software Foundation License Version 2, whose text, with the
licences of earlier releases, is in LICENSE.txt.

text.jsonl              docstrings, signatures and comments of the library's modules, and the topics
                        of the language reference in `pydoc_data`, set as pages
chats.jsonl             docstrings and signatures of public objects, set as questions and answers
chats-heldout.jsonl     the same, of objects that the other files do not contain
base/, latent/          tokenizers trained on text.jsonl and chats.jsonl, and config.json files
                        written for this project
base/model.safetensors  weights of a small model trained on text.jsonl

Changes to the original: indentation, line ends, author and copyright lines were removed, long texts
were cut, questions and connecting sentences were added.

Some files of the library carry the notices of their own authors beside Python's. They follow, each
under the modules whose files carry it.
"""
_COPYRIGHT = re.compile(r"(?i)\bcopyright\b.*\d{4}|\(c\) *\d{4}")


def write_notices(folder: Path, library: Path, files: Iterable[tuple[str, Path]], python: str) -> None:
    """Write NOTICE and copy the licence text that CPython installs with its library."""
    modules: dict[str, list[str]] = {}
    for module, path in files:
        for notice in legal_notices(read_source(path)):
            modules.setdefault(notice, []).append(module)
    parts = [NOTICE.format(python=python)]
    for notice, names in modules.items():
        parts.append("\n".join(textwrap.wrap(", ".join(dict.fromkeys(names)), 98)))
        parts.append(textwrap.indent(notice, "    ", lambda line: bool(line.strip())) + "\n")
    (folder / "NOTICE").write_text("\n".join(parts), encoding="utf-8")
    source = library / "LICENSE.txt"
    if source.is_file():
        (folder / "LICENSE.txt").write_bytes(source.read_bytes())


def legal_notices(source: str) -> Iterator[str]:
    """Comment blocks and top-level strings of a file that state a copyright."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.startswith("#"):
            block.append(line.lstrip("#").removeprefix(" ").rstrip())
            continue
        yield from _stated("\n".join(block))
        block = []
    for node in ast.parse(source).body:
        value = node.value if isinstance(node, ast.Assign | ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            # A module's docstring holds documentation too: its paragraphs from the notice on.
            paragraphs = textwrap.dedent(value.value).strip().split("\n\n")
            first = next((i for i, text in enumerate(paragraphs) if _COPYRIGHT.search(text)), len(paragraphs))
            yield from _stated("\n\n".join(paragraphs[first:]))


def _stated(text: str) -> Iterator[str]:
    if _COPYRIGHT.search(text):
        yield text.strip()
