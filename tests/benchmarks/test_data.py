"""The benchmark of the data side runs, and its figures agree with each other."""

import json

import pytest

from benchmarks import data

SMALL = ["--repeats", "1", "datasets.0.split=train[:300]", "sequence_len=512"]


def test_figures_agree(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert data.main([*SMALL, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["data"]["sequence_len"] == 512
    assert report["rows"] == report["documents"] + report["dropped"] == 300
    stages = report["stages"]
    assert list(stages) == ["template and encode", "pack", "prepare, all of it", "read packs"]
    for stage in stages.values():
        assert stage["s"] > 0 and stage["tokens_per_s"] * stage["s"] == pytest.approx(stage["tokens"])
    assert stages["template and encode"]["tokens"] >= report["tokens"] > 0
    assert stages["pack"]["tokens"] == stages["read packs"]["tokens"] == report["tokens"]
    assert 0.9 < report["efficiency"] == report["tokens"] / (report["packs"] * 512) <= 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in stages)
    assert f"{report['packs']:,} packs, {report['efficiency']:.2%} of their positions used" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats: 0 is not valid; give 1 or more"),
        (["datasets.0.path=nowhere.jsonl"], "datasets.0.path: nowhere.jsonl does not exist"),
        (["sequence_length=512"], "sequence_length: 512: unknown key"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert data.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
