"""The contest of ways to prepare chats runs through Ray, and every way has seen the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.soak
@pytest.mark.timeout(170)
def test_all_three_prepare_the_same_chats(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/data_peers.py", "--chats", "200", "--repeats", "1", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode in (0, 1), done.stderr  # so few chats are over before Ray's processes are up
    report = json.loads(out.read_text())
    rates, tokens = report["rates"], report["tokens"]
    assert list(rates) == ["datasets.map", "nemo_ray", "encode alone"] and min(rates.values()) > 0
    assert tokens["datasets.map"] == tokens["nemo_ray"] == tokens["encode alone"] > 150_000
    assert report["first_window_s"] > 0 and "promised" in done.stdout
