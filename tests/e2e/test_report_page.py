"""Reports in a real browser, at two widths: Chromium draws every chart, and fetches nothing."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ray.view import report
from tests.tune.test_report import write_sweep
from tests.view.runs import write_run

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
_BROWSERS_OWN = "not an origin"
"""Who asks for what no page did, in Chromium's log."""


def dom(page: Path, width: int, folder: Path) -> tuple[str, list[str]]:
    """What the page is once its scripts have run, and the addresses that it asked for over the network."""
    browser = shutil.which("chromium")
    if browser is None:
        assert os.environ.get("CI") != "true", "this test needs chromium (apt-get install chromium)"
        pytest.skip("chromium is not installed")
    log = folder / "net.json"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},3000"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    command += ["--virtual-time-budget=8000", "--dump-dom", f"file://{page}"]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return drawn, sorted({one["url"] for one in asked if one["initiator"] != _BROWSERS_OWN})


def of_a_sweep(folder: Path) -> tuple[Path, int, int]:
    return write_sweep(folder / "sweep").report_file, 5, 3


def of_a_run(folder: Path) -> tuple[Path, int, int]:
    run = write_run(folder / "run", outcome="finished")
    report.write(str(run.path), None)
    return run.report_file, 7, 2


@pytest.mark.parametrize("width", [1280, 600])
@pytest.mark.parametrize("write", [of_a_sweep, of_a_run])
def test_every_chart_is_drawn(
    tmp_path: Path, write: Callable[[Path], tuple[Path, int, int]], width: int
) -> None:
    page, num_charts, num_lines = write(tmp_path)
    drawn, asked = dom(page, width, tmp_path)
    assert not asked
    drawn = drawn[drawn.index("<body>") :]
    charts = drawn.split('class="plotly-graph-div')[1:]
    assert len(charts) == num_charts
    for chart in charts:
        assert 'class="main-svg"' in chart and re.search(r'class="(trace|point)[ "]', chart)
    assert charts[0].count('class="trace scatter') >= num_lines
    widths = [float(found) for found in re.findall(r'class="main-svg"[^>]*? width="([\d.]+)"', drawn)]
    assert widths and max(widths) <= width


def test_a_page_that_fetches_something_would_be_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<body><img src="http://127.0.0.1:9/picture.png"></body>')
    assert dom(page, 600, tmp_path)[1] == ["http://127.0.0.1:9/picture.png"]
