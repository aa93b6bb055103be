"""docs/formats.md: each example is read by the command, and looks as the page says."""

import json
import re
from pathlib import Path

import pytest
import yaml

from nemo_ray.data.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "nemo_ray/demo/assets/base"
PAGE = (REPOSITORY / "docs/formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n([^`]*)```\n\n```json\n([^`]*)```\n\n```text\n([^`]*)```", PAGE, re.DOTALL)


def test_the_page_shows_every_type() -> None:
    shown = [yaml.safe_load(keys) for keys, _, _ in EXAMPLES]
    types = {entry.get("type", "chat_template") for keys in shown for entry in keys.get("datasets", [])}
    assert types == {
        "chat_template",
        "prompt_completion",
        "alpaca",
        "input_output",
        "completion",
        "tokenized",
    }
    assert any("pretraining_dataset" in keys for keys in shown)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_are_shown_as_on_the_page(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, row, text = EXAMPLES[number]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    config = {"base_model": str(BASE), "sequence_len": 512, **yaml.safe_load(keys)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["config.yaml", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert text and text in out.replace(" \n", "\n"), out
