"""What the pages name is there, headings too, and the site is built from them without other hosts."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("SECURITY.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
_CODE = re.compile(r"`((?:tests|nemo_ray|benchmarks|configs|docs)/[\w./-]+)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_FETCHING = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "track", "video"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in _CODE.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in _LINK.findall(text) if not (page.parent / name).exists()]
    assert not missing


def test_pages_name_files_at_all() -> None:
    assert sum(len(_CODE.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 50
    assert sum(len(_LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 50


# -- headings that links lead to ------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub, and with the slugs of mkdocs.yml on the site."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")


def slugs(page: Path) -> set[str]:
    """The anchors of a page."""
    return {slug(heading) for heading in _HEADING.findall(without_code(page))}


def without_code(page: Path) -> str:
    """A page less its fenced blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_headings_that_a_page_links_to_exist(page: Path) -> None:
    links = _ANCHOR.findall(without_code(page))
    dead = [f"{name}#{anchor}" for name, anchor in links if anchor not in slugs(page.parent / name or page)]
    assert not dead


def test_slugs() -> None:
    assert slug("Will it fit, and what will it cost?") == "will-it-fit-and-what-will-it-cost"
    assert slug("The `ray` section") == "the-ray-section"
    assert slug("Nano: 4 bits - or [16](a.md)") == "nano-4-bits---or-16"
    assert sum(len(_ANCHOR.findall(without_code(page))) for page in PAGES) > 10


# -- the site -------------------------------------------------------------------------------------


class Fetched(HTMLParser):
    """What a browser fetches to show a page: the addresses in tags that load something."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _FETCHING:
            self.addresses += [value for name, value in attrs if name in ("data", "href", "src") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning ends the build."""
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_has_a_page_for_each_file(site: Path) -> None:
    wanted = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {page.stem for page in site.glob("*.html")} == wanted | {"404"}
    assert not list(site.rglob("*.py*"))


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    fetched = {page.name: Fetched(page).addresses for page in site.rglob("*.html")}
    assert all(any(address.endswith(".css") for address in addresses) for addresses in fetched.values())
    foreign = re.compile(r"(?:\w+:)?//")
    assert not [(page, one) for page, addresses in fetched.items() for one in addresses if foreign.match(one)]
    styles = [style.read_text(encoding="utf-8") for style in site.rglob("*.css")]
    assert styles and not [found for style in styles for found in loaded_by(style)]


def loaded_by(style: str) -> Iterator[str]:
    """The addresses on other hosts that a style sheet loads: imports, fonts, images."""
    yield from re.findall(r"@import[^;]*//[^;]*;|url\(\s*[\"']?(?:https?:)?//[^)]*\)", style)


def test_a_link_out_of_the_docs_becomes_a_files_name() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "docs_hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "[README.md](../README.md), [how](../cluster/a.yaml#b), [here](config.md)\n```\n[a](../b)\n```\n"
    wanted = "`README.md`, how (`cluster/a.yaml`), [here](config.md)\n```\n[a](../b)\n```\n"
    assert hooks.on_page_markdown(text, page=None) == wanted
