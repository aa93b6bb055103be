"""What the pages name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_CODE = re.compile(r"`((?:tests|nemo_ray|benchmarks|configs|docs)/[\w./-]+)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in _CODE.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in _LINK.findall(text) if not (page.parent / name).exists()]
    assert not missing


def test_pages_name_files_at_all() -> None:
    assert sum(len(_CODE.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 50
    assert sum(len(_LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 50
