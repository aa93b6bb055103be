"""Pre-training text: the library's documentation as plain pages, in the manner of `help()`.

Owns the rows of `text.jsonl`, `{"text": ...}`. Held-out objects appear in none of them, not even
with their signature.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

from nemo_ray.demo.library import Library
from nemo_ray.demo.source import Documented

_PAGE = 2300  # characters: a page stays well under 1,024 tokens of the demo's tokenizer
_SHORTEST = 160  # a page below this says next to nothing
_KEYWORDS = {"class": "class", "property": "property"}


def text_rows(library: Library) -> list[dict[str, str]]:
    """One row a page: modules with their classes and functions, notes from the source, topics."""
    pages: list[str] = []
    objects = [item for item in library.objects if item.doc or _worth_a_signature(item)]
    for module, items in groupby(objects, key=lambda item: item.module):
        pages.extend(_module_pages(module, list(items)))
    for module, notes in groupby(library.comments, key=lambda note: note[0]):
        pages.extend(_pages(f"Notes from the source of {module}", [text for _, text in notes]))
    for name, text in library.topics:
        pages.extend(_pages(f"Python language reference: {name}", text.split("\n\n")))
    return [{"text": page} for page in dict.fromkeys(pages) if len(page) >= _SHORTEST]


def _worth_a_signature(item: Documented) -> bool:
    """Undocumented objects are named where users meet them; `__init__` stands in the class line."""
    return item.public and not item.module.startswith(("encodings.", "distutils.", "tkinter."))


def _module_pages(module: str, items: list[Documented]) -> Iterator[str]:
    heads = [item for item in items if not item.path]
    head = [item.doc for item in heads if item.doc]
    classes = {item.path: item for item in items if item.kind == "class"}
    documented = {item.path for item in items if item.doc} | {item.parent for item in items if item.doc}
    tops = [item for item in items if item.path and not item.parent and item.kind != "class"]
    yield from _pages(f"module {module}", [*_split(head), *map(_entry, tops)])
    for path, item in classes.items():
        if path not in documented:
            continue
        members = [m for m in items if m.parent == path and m.kind != "class"]
        title = f"class {module}.{path}{item.signature}"
        yield from _pages(title, [*_split([item.doc]), *map(_entry, members)])


def _split(texts: Iterable[str]) -> list[str]:
    return [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph]


def _entry(item: Documented) -> str:
    """Signature line and indented documentation of a function, method or property."""
    name = item.path.rpartition(".")[2]
    keyword = "async def" if item.kind.startswith("coroutine") else _KEYWORDS.get(item.kind, "def")
    lines = [f"{keyword} {name}{item.signature}"]
    lines += [f"    {line}" if line else "" for line in item.doc.splitlines()]
    return "\n".join(lines)


def _pages(title: str, entries: Iterable[str]) -> Iterator[str]:
    """Fill pages of at most `_PAGE` characters with whole entries; longer entries are cut at lines."""
    page: list[str] = []
    size = 0
    for entry in (piece for whole in entries for piece in _pieces(whole)):
        if page and size + len(entry) > _PAGE:
            yield "\n\n".join([title, *page])
            page, size = [], 0
        page.append(entry)
        size += len(entry) + 2
    if page:
        yield "\n\n".join([title, *page])


def _pieces(entry: str) -> Iterator[str]:
    lines: list[str] = []
    for line in entry.splitlines():
        if lines and sum(map(len, lines)) + len(line) > _PAGE:
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    if "".join(lines).strip():
        yield "\n".join(lines)
