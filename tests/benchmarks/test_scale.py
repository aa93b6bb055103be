"""The simulation runs, and what it measures stays in proportion to the windows."""

import json
from pathlib import Path

import pytest

from benchmarks import scale


def test_the_figures_of_a_small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["scale.py", "--rows", "2e7", "--nodes", "2", "--out", str(out)])
    assert scale.main() == 0
    found = json.loads(out.read_text())
    assert found["windows"] == pytest.approx(2e7 / 16_384, rel=0.02)
    assert found["packs of a step"] == 16
    assert found["plan sent to a worker, MB"] * 1e6 < 150 * found["windows"]
    assert found["plan file, MB"] * 1e6 < 150 * found["windows"]
    assert found["place in a checkpoint, kB"] < 1.0


@pytest.mark.timeout(60)
def test_a_place_late_in_a_long_epoch_is_taken_up_at_once() -> None:
    found = scale.measure(200_000_000, 100)
    assert found["place taken up, s"] < 0.1 and found["an epoch begun, s"] < 1.0
