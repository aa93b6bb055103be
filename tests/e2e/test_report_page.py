"""A sweep's report in a real browser, at two widths: Chromium draws every chart."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tune.test_report import write_sweep

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]
NUM_CHARTS = 5


def dom(page: Path, width: int) -> str:
    """What the page is once its scripts have run."""
    browser = shutil.which("chromium")
    assert browser, "this test needs chromium (apt-get install chromium)"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},3000"]
    command += ["--virtual-time-budget=8000", "--dump-dom", f"file://{page}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [1280, 600])
def test_every_chart_is_drawn(tmp_path: Path, width: int) -> None:
    drawn = dom(write_sweep(tmp_path / "sweep").report_file, width)
    drawn = drawn[drawn.index("<body>") :]
    charts = drawn.split('class="plotly-graph-div')[1:]
    assert len(charts) == NUM_CHARTS
    for chart in charts:
        assert 'class="main-svg"' in chart and re.search(r'class="(trace|point)[ "]', chart)
    assert charts[0].count('class="trace scatter') >= 3, "a line for each trial"
    widths = [float(found) for found in re.findall(r'class="main-svg"[^>]*? width="([\d.]+)"', drawn)]
    assert widths and max(widths) <= width
