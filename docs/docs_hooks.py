"""A hook of mkdocs: what lies outside docs/ is not on the site, so links to it become names of files."""

import re
from typing import Any

_FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../FILE)` as text and the file's name, which is that in the repository."""
    parts = _FENCED.split(markdown)
    return "".join(part if index % 2 else _OUTSIDE.sub(_plain, part) for index, part in enumerate(parts))


def _plain(link: re.Match[str]) -> str:
    text, file = link.groups()
    return f"`{file}`" if text.strip("`") == file else f"{text} (`{file}`)"
