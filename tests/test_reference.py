"""The page of the command line is what the generator writes, and has every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ray.cli import COMMANDS
from nemo_ray.reference import reference

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def section(name: str) -> str:
    """The part of the page about one command."""
    return reference().partition(f"\n## `nemo-ray {name}`\n")[2].partition("\n## ")[0]


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m nemo_ray.reference docs/cli.md"


@pytest.mark.parametrize("name", [*COMMANDS, "tune merge"])
def test_the_page_has_each_commands_usage_and_arguments(name: str) -> None:
    text = section(name)
    assert "usage: " in text and "positional arguments:" in text and "options:" in text


def test_a_section_says_what_the_help_says() -> None:
    assert "replaces a key of the file" in section("train") and "exit codes: 0 done" in section("train")
    assert "--shard i/n" in section("tune") and "--shard" not in section("tune merge")


@pytest.mark.parametrize("columns", ["40", "250", None])
def test_the_terminal_does_not_change_the_page(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert reference() == PAGE.read_text(encoding="utf-8")


def test_it_writes_the_file_and_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    for argument in ("cli.md", "--help"):
        command = [sys.executable, "-m", "nemo_ray.reference", argument]
        assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cli.md"]
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == reference()
    loaded = "import sys; from nemo_ray.reference import reference; reference(); print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert not {"torch", "ray", "transformers"} & set(told.stdout.split())
