"""The recipe gives the committed assets again, and keeps what is held out out of them."""

import json
from pathlib import Path

import pytest

from nemo_ray.demo import ASSETS
from nemo_ray.demo.__main__ import main
from nemo_ray.demo.chats import chat_rows, summary, trim
from nemo_ray.demo.library import read_library
from nemo_ray.demo.recipe import WEIGHTS, build, differing_files, differs_from_builder
from nemo_ray.demo.source import clean, comments, documented_objects, squeezed, standard_library
from nemo_ray.demo.text import text_rows

MAX_ASSETS_BYTES = 12_000_000
MAX_DATA_BYTES = 5_800_000


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


def answers_of(rows: list[dict]) -> list[str]:
    return [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]


def contents_of(rows: list[dict]) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"]]


def skip_unless_builder() -> None:
    reason = differs_from_builder()
    if reason is not None:
        pytest.skip(reason)


def test_rebuilding_some_modules_is_deterministic() -> None:
    first, second = (read_library(standard_library(), only=["textwrap", "shlex", "json"]) for _ in range(2))
    assert first == second
    assert chat_rows(first) == chat_rows(second)
    assert text_rows(first) == text_rows(second)
    names = {item.name for item in first.objects}
    assert {"textwrap.TextWrapper.wrap", "shlex.split", "json.dumps"} <= names
    assert len(chat_rows(first)[0]) >= 20


def test_committed_assets_equal_rebuilt_ones(tmp_path: Path) -> None:
    skip_unless_builder()
    build(tmp_path)
    assert differing_files(tmp_path, ASSETS) == []


def test_command_names_the_differing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A changed, a missing and an extra file are all named."""
    for name in ("changed", "only_built"):
        (tmp_path / "built").mkdir(exist_ok=True)
        (tmp_path / "built" / name).write_text("a")
    for name in ("changed", "only_committed"):
        (tmp_path / "committed").mkdir(exist_ok=True)
        (tmp_path / "committed" / name).write_text("b")
    found = differing_files(tmp_path / "built", tmp_path / "committed")
    assert found == ["changed", "only_built", "only_committed"]
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--base" in capsys.readouterr().out


def test_held_out_documentation_occurs_in_no_training_file() -> None:
    """No docstring of a held-out object, nor its first paragraph, is in the text or the chats."""
    skip_unless_builder()
    held_out = read_library(standard_library()).held_out
    assert 300 <= len(held_out) <= 420
    training = "\n".join(squeezed(row["text"]) for row in rows_of("text.jsonl"))
    training += "\n".join(squeezed(content) for content in contents_of(rows_of("chats.jsonl")))
    # The check can see what it looks for: what was trained on is found.
    assert "Text wrapping and filling." in training
    leaked = [i.name for i in held_out for d in (i.doc, i.doc.split("\n\n")[0]) if squeezed(d) in training]
    assert leaked == []
    questions = [row["messages"][-2]["content"] for row in rows_of("chats-heldout.jsonl")]
    assert len(questions) == len(held_out)


def test_held_out_answers_occur_in_no_training_file() -> None:
    """The same from the committed files alone, under any Python."""
    text = "\n".join(squeezed(row["text"]) for row in rows_of("text.jsonl"))
    chats = rows_of("chats.jsonl")
    answers = {squeezed(answer) for answer in answers_of(chats)}
    whole = text + "\n".join(answers)
    for row in rows_of("chats-heldout.jsonl"):
        final = squeezed(row["messages"][-1]["content"])
        assert final not in answers
        assert final not in whole


def test_rows_are_chats_with_distinct_answers() -> None:
    chats, held_out = rows_of("chats.jsonl"), rows_of("chats-heldout.jsonl")
    assert 5000 <= len(chats) <= 8000
    answers = answers_of(chats + held_out)
    assert len(set(answers)) == len(answers)
    for row in chats + held_out:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(m["content"] == m["content"].strip() != "" for m in row["messages"])
    lengths = [len(row["messages"]) for row in chats]
    assert lengths.count(4) + lengths.count(5) >= 300  # more than one turn
    assert 500 <= sum(row["messages"][0]["role"] == "system" for row in chats) <= 1500


def test_no_trace_of_the_building_machine() -> None:
    root = str(standard_library())
    for name in ("text.jsonl", "chats.jsonl", "chats-heldout.jsonl", "base/tokenizer.json"):
        content = (ASSETS / name).read_text(encoding="utf-8")
        assert root not in content
        assert " object at 0x7f" not in content


def test_sizes() -> None:
    sizes = {p.relative_to(ASSETS).as_posix(): p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()}
    assert sum(size for name, size in sizes.items() if name.endswith(".jsonl")) <= MAX_DATA_BYTES
    assert sum(sizes.values()) <= MAX_ASSETS_BYTES
    assert sum(size for name, size in sizes.items() if name != WEIGHTS) <= MAX_DATA_BYTES + 300_000


def test_notices_come_with_the_text() -> None:
    licence = (ASSETS / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    notice = (ASSETS / "NOTICE").read_text(encoding="utf-8")
    assert "Copyright (c) 2001-2023 Python Software Foundation" in notice
    assert "Sam Rushing" in notice and "Vinay Sajip" in notice


def test_source_is_read_and_not_run(tmp_path: Path) -> None:
    """Definitions under conditions count, setters do not, and importing would fail."""
    path = tmp_path / "sample.py"
    path.write_text(
        'raise SystemExit("imported")\n'
        "class Box:\n"
        '    """A box.\n\n    Author: X <x@example.org>\n    """\n'
        "    def __init__(self, size, /, *, lid=None): pass\n"
        "    @property\n"
        '    def size(self):\n        """Its size."""\n'
        "    @size.setter\n"
        '    def size(self, value):\n        """No entry."""\n'
        "try:\n    import nothing\nexcept ImportError:\n"
        '    async def load(path, *parts, **options):\n        """Load."""\n'
    )
    found = {item.name: item for item in documented_objects([("sample", path)])}
    assert list(found) == ["sample", "sample.Box", "sample.Box.__init__", "sample.Box.size", "sample.load"]
    assert found["sample.Box"].doc == "A box."
    assert found["sample.Box"].signature == "(size, /, *, lid=None)"
    assert (found["sample.Box.size"].kind, found["sample.Box.size"].doc) == ("property", "Its size.")
    assert found["sample.load"].kind == "coroutine function"
    assert found["sample.load"].signature == "(path, *parts, **options)"
    assert not found["sample.Box.__init__"].public


def test_comments_leave_out_code_and_legal_notices() -> None:
    words = "# A line of prose that explains why the code below is as it is, and what to mind.\n" * 3
    assert len(list(comments(words + "x = 1\n"))) == 1
    assert list(comments("# Copyright 2001 Somebody\n" + words)) == []
    assert list(comments("# value = compute(1)\n" * 20)) == []


def test_cutting_texts() -> None:
    assert clean("One.\n\n\n\n    Two.\n    Copyright 1999 X\n") == "One.\n\nTwo."
    long = "First paragraph.\n\n" + "word " * 200 + "\n\nlast"
    assert trim(long, 2000) == long
    assert len(trim(long, 500)) <= 500
    assert trim("a" * 40 + "\n\n" + "b" * 40 + "\n\n" + "c" * 40, 90) == "a" * 40 + "\n\n" + "b" * 40
    assert summary("Return the value.  Raise KeyError otherwise.\n\nMore.") == "Return the value."
