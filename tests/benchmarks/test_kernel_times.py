"""The benchmark of the kernels runs, and times every kernel that there is."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_is_timed(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks/kernel_times.py"), "--model", "tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 14
    assert all(row["kernel_us"] > 0 and row["reference_us"] > 0 for row in rows.values())
