"""`nemo-ray report`: the page of a run."""

import json
import re
from pathlib import Path

import pytest

from nemo_ray.cli import main
from nemo_ray.run_dir import RunDir
from nemo_ray.train.driver import this_driver
from tests.tune.test_report import charts, write_sweep
from tests.view.runs import SCRIPT, hold, step_row, write_run


def page_of(run: RunDir) -> str:
    assert main(["report", str(run.path)]) == 0
    return run.report_file.read_text()


def test_what_the_page_shows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outcome="finished", ended_at="2026-11-29T17:00:00+00:00")
    run.rejected_file.write_text("{}\n{}\n")
    page = page_of(run)
    loss, by_dataset, *_ = drawn = charts(page)
    assert len(drawn) == 7
    training, held_out = loss
    assert training["x"] == list(range(1, 41)) and training["y"][0] == pytest.approx(4 - 1 / 40)
    assert held_out["x"] == [0, 20, 40] and held_out["y"] == pytest.approx([4.0, 3.6, 3.2])
    assert [line["name"] for line in by_dataset] == ["a", "b"]
    for part in (
        "<dd>finished<small>step 40",
        "2 rejected rows",
        "60.0% of them trained",
        "a note",
        "lora_r: 16",
    ):
        assert part in page, part
    assert 'http-equiv="refresh"' not in page


def test_a_recorded_profile_is_told_by_kind_of_kernel(tmp_path: Path) -> None:
    times = {"communication": 20.0, "scan and conv": 0.0, "matmul": 60.0}
    facts = {"first_step": 6, "steps": 2, "step_ms": 100.0, "busy_ms": 75.0, "class_ms": times}
    page = page_of(write_run(tmp_path / "run", profile=facts | {"communication_alone_ms": 12.5}))
    assert "100 ms a step, of 2 steps from step 6; 12.5 ms in which only communication ran" in page
    rows = page[page.index("Where a step") :]
    for kind, ms, share in (("communication", 20, 20), ("matmul", 60, 60), ("nothing runs", 25, 25)):
        assert f'<th scope="row">{kind}</th><td>{ms}.0</td><td>{share}.0%</td>' in rows, kind
    assert "scan and conv" not in rows and "from the host" not in page
    facts["class_ms"] = times | {"host copies": 30.0}
    facts |= {"communication_alone_ms": 12.5, "host_copies_alone_ms": 2.5}
    page = page_of(write_run(tmp_path / "moving", profile=facts))
    assert "; 2.5 ms in which only copies to or from the host ran" in page


def test_nothing_in_it_is_markup_of_others(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", notices=[SCRIPT], error=SCRIPT, outcome="failed"))
    body = page[page.index("<body>") :]
    assert SCRIPT not in body and "<b>" not in body
    assert "&lt;script&gt;alert(1)" in body
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", page)


def test_a_run_that_goes_on_loads_anew(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hold(run, this_driver(None))
    assert 'http-equiv="refresh"' in page_of(run)


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outcome="finished")
    with open(run.metrics_file, "a") as file:
        file.writelines(json.dumps(step_row(step)) + "\n" for step in range(41, 10_001))
    training = charts(page_of(run))[0][0]
    assert len(training["x"]) <= 300 and training["x"][-1] == 10_000


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write_run({"config": {"base_model": "b"}, "outcome": "failed", "error": "no weights"})
    page = page_of(run)
    assert "failed: no weights" in page and not charts(page)


def test_the_page_is_the_runs_own(tmp_path: Path) -> None:
    """So a run that replaces this one may remove it."""
    run = write_run(tmp_path / "run")
    page_of(run)
    assert run.foreign_entries() == []
    run.clear()
    assert not run.report_file.exists()


def test_of_a_sweep_and_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = write_sweep(tmp_path / "sweep"), tmp_path / "other.html"
    assert main(["report", str(folder.path), "--output", str(other)]) == 0
    assert "Sweep sweep" in other.read_text() and str(other) in capsys.readouterr().out
    for taken, said in ((str(tmp_path), str(tmp_path)), ("", ".")):
        assert main(["report", str(folder.path), "--output", taken]) == 2
        assert capsys.readouterr().err == f"error: --output: {said} is a folder; name a file\n"
    assert main(["report", str(tmp_path)]) == 2
    assert "no run is here" in capsys.readouterr().err
