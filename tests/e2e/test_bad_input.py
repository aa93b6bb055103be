"""Mistakes of a user, through the command: one line, the right exit code, and nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT, TRAIN, Command
from tests.e2e.compare import train_rows
from tests.e2e.world import ASSETS, BAD_ROWS, NO_ANSWER, NO_FIELD, World, first_lines, write_lines

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def refused(started: Command, code: int, *words: str) -> str:
    """The one line of a command that ends with `code`; it holds `words`, and no traceback is shown."""
    assert started.end() == code, started.output
    assert "Traceback" not in started.output, started.output
    (line,) = started.errors
    assert started.output.rstrip().endswith(line), started.output
    assert all(word in line for word in words), line
    assert started.leaves_nothing_behind(), started.tree()
    return line


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder`, with its size and time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- refused before anything is started -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "nowhere"}, ("base_model", "nowhere", "does not exist")),
        ({"lora_rank": 8}, ("lora_rank", "lora_r")),
        ({"lora_r": "many"}, ("lora_r", "many")),
        ({"datasets": [{"path": "missing/chats.jsonl"}]}, ("datasets.0.path", "missing/chats.jsonl")),
    ],
    ids=lambda item: "-".join(item) if isinstance(item, dict) else "",
)
def test_a_wrong_configuration(world: World, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    run = world.run_dir("refused")
    refused(world.train("refused", **changes), 2, *words)
    assert not run.path.exists()


def test_a_refusal_needs_neither_torch_nor_ray(world: World) -> None:
    config = world.write_yaml(learning_rates=1)
    command = [sys.executable, "-X", "importtime", *TRAIN[1:], str(config)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.returncode == 2 and "learning_rate" in told.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in told.stderr.splitlines() if line.startswith("import time")
    }
    assert "pydantic" in imported
    assert not imported & {"torch", "ray", "transformers", "datasets", "pyarrow"}


def test_no_configuration(world: World) -> None:
    refused(world.command(*TRAIN, "nowhere.yaml"), 2, "nowhere.yaml")


def test_a_base_of_another_architecture(world: World) -> None:
    other = world.folder / "llama"
    shutil.copytree(world.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refused(world.train("refused", base_model=str(other)), 2, "base_model", str(other), "llama", "nemotron_h")


def test_an_output_dir_that_holds_a_run(world: World, reference: RunDir) -> None:
    before = contents(reference.path)
    line = refused(world.train("reference"), 2, "output_dir", str(reference.path))
    assert "overwrite=true" in line and "resume_from_checkpoint=auto" in line
    assert contents(reference.path) == before


def test_overwrite_spares_a_folder_that_is_no_runs(world: World) -> None:
    folder = world.folder / "papers"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    config = world.write_yaml(output_dir=str(folder))
    refused(world.command(*TRAIN, str(config), "overwrite=true"), 2, "output_dir", "thesis.txt")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


# -- rows -----------------------------------------------------------------------------------------


def test_no_row_has_the_field(world: World) -> None:
    rows = write_lines(world.folder / "no-field.jsonl", [NO_FIELD] * 20)
    started = world.train("refused", datasets=[{"path": str(rows)}])
    refused(started, 2, "datasets[0].field_messages", "'messages'", "conversation")


def test_no_row_has_an_answer(world: World) -> None:
    rows = write_lines(world.folder / "no-answer.jsonl", [NO_ANSWER] * 20)
    refused(world.train("refused", datasets=[{"path": str(rows)}]), 1, "datasets[0]", str(rows), "assistant")


def test_a_few_bad_rows_are_counted_and_listed(world: World, reference: RunDir) -> None:
    output = world.output_of(reference.path.name)
    for reason in ("no field 'messages'", "no assistant turn", "invalid JSON"):
        assert re.search(rf"^data: .*\brejected: 1 .*{reason}$", output, re.MULTILINE), output
    (place,) = re.findall(r"^data: rejected rows are listed in (.*)$", output, re.MULTILINE)
    listed = [json.loads(line) for line in Path(place).read_text().splitlines()]
    assert sorted(entry["row"] for entry in listed) == sorted(BAD_ROWS)
    assert all(entry["file"].endswith("chats.jsonl") and entry["reason"] for entry in listed)
    assert re.search(r"^data: .*\d+ documents cut to sequence_len", output, re.MULTILINE), output


@pytest.mark.soak
def test_unmarked_templates_and_dropped_rows_are_told(world: World) -> None:
    marked = (world.base / "chat_template.jinja").read_text()
    unmarked, num_marks = re.subn(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked)
    assert num_marks == 2
    template = world.folder / "unmarked.jinja"
    template.write_text(unmarked)
    changes = {"chat_template": str(template), "excess_length_strategy": "drop", "max_steps": 1}
    run = world.finished("unmarked", **changes)
    output = world.output_of("unmarked")
    assert "note: chat_template: it has no {% generation %} marks, so" in output
    assert re.search(r"^data: .*\d+ documents dropped \(longer than sequence_len\)", output, re.MULTILINE), (
        output
    )
    assert len(train_rows(run)) == 1 and run.adapter_dir.is_dir()


@pytest.mark.soak
def test_many_bad_rows_stop_the_run(world: World) -> None:
    lines = [*first_lines(ASSETS / "chats.jsonl", 90), *[NO_ANSWER] * 10]
    rows = write_lines(world.folder / "many-bad.jsonl", lines)
    started = world.train("many-bad", datasets=[{"path": str(rows)}])
    refused(started, 1, "10 of the", "max_rejected_share 0.05", "assistant", "many-bad.jsonl row 90")
    assert not world.run_dir("many-bad").holds_run()


# -- found by the workers -------------------------------------------------------------------------


def test_a_target_that_matches_nothing(world: World) -> None:
    started = world.train("refused", lora_target_modules=["q_porj"])
    refused(started, 2, "lora_target_modules", "'q_porj'", "matches nothing", "q_proj")
    assert not world.run_dir("refused").holds_run()  # nothing that the next start would have to overwrite


@pytest.mark.soak
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_weights(world: World, damage: str) -> None:
    broken = world.folder / f"base-{damage}"
    shutil.copytree(world.base, broken)
    weights = broken / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(b"\xff" * 4096 if damage == "garbage" else data[: len(data) // 2])
    started = world.train("refused", base_model=str(broken), ray={"num_workers": 2}, micro_batch_size=2)
    refused(started, 1, "base_model", str(weights))
    assert not world.run_dir("refused").holds_run()


# -- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: enough to begin, too small for a checkpoint or two."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, timeout=30
        )
    except OSError:
        pytest.skip("no mount command")
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


@pytest.mark.long
def test_a_full_disk(world: World, small_disk: Path) -> None:
    output = small_disk / "run"
    config = world.write_yaml(output_dir=str(output), save_steps=1, save_total_limit=None)
    started = world.command(*TRAIN, str(config))
    refused(started, 1, str(output))
    newest = RunDir(output).newest_checkpoint()
    assert newest is None or json.loads((newest / "state.json").read_text())["step"] >= 1
