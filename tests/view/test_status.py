"""`nemo-ray status`: what is said of a run, from its directory alone."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray.cli import main
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import StoredRunDir, working_folder
from nemo_ray.train.driver import this_driver
from nemo_ray.view.seen import BROKEN_OFF, RUNNING, UNSEEN, see
from tests.object_store import ObjectStore
from tests.tune.test_report import POINTS, write_sweep
from tests.view.runs import hold, progress, write_run

NOW = {"phase": "training", "step": 40, "max_steps": 80, "loss": 3.0, "eta_s": 60.0, "progress": 0.5}


def status(place: object, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["status", str(place), *options])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    hold(run, this_driver("job-7"))
    progress(run, NOW)
    run.append_failure({"line": "rank 1 was killed", "restart": True})
    code, said = status(run.path, capsys)
    assert code == 0
    for part in (
        "running, by process",
        "(submission job-7)",
        "lora, r=16; 262,528 of 2,881,608 parameters",
        "step 40/80",
        "ETA 1:00",
        "40 of 80, last loss 3.0000",
        "4.0000 first, 3.2000 last, best 3.2000 at step 40",
        "tokens/s, 0.5 s a step; 10.0% of the time without data",
        "1.0 GiB at most",
        "1 step without a finite loss",
        "2, mesh 1 x 2",
        "2026-11-29 16:00:44 UTC  started with 2 workers",
        "rank 1 was killed; the workers started again",
        "a note",
    ):
        assert part in said, part
    assert len(said.splitlines()) < 24


def test_what_json_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    hold(run, this_driver(None))
    progress(run, NOW)
    run.append_failure({"line": "rank 1 was killed", "restart": True})
    code, said = status(run.path, capsys, "--json")
    found = json.loads(said)
    assert code == 0 and found["state"] == RUNNING and found["restarts"] == 1
    assert (found["step"], found["max_steps"], found["best_step"]) == (40, 80, 40)
    assert found["tokens_per_s"] == pytest.approx(2030.5) and found["data_wait_share"] == pytest.approx(0.1)
    assert [event["what"] for event in found["events"]][0] == "started with 2 workers"


def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, me = write_run(tmp_path / "run"), this_driver(None)
    assert status(run.path, capsys)[0] == 1  # nobody is at work
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    for driver, state, code in (
        (me, RUNNING, 0),
        (dataclasses.replace(me, pid=ended.pid), BROKEN_OFF, 1),
        (dataclasses.replace(me, pid_space="elsewhere", host="far"), UNSEEN, 0),
    ):
        hold(run, driver)
        found, said = status(run.path, capsys)
        assert found == code and f"state        {state}" in said
    for outcome, code in (("finished", 0), ("stopped", 1), ("failed", 1)):
        run.update_run({"outcome": outcome, "ended_at": "2026-11-29T17:00:00+00:00", "error": "no disk"})
        found, said = status(run.path, capsys)
        assert found == code and f"state        {outcome}" in said
        assert f"2026-11-29 17:00:00 UTC  {outcome}: no disk" in said


def test_events_of_earlier_attempts_come_first(tmp_path: Path) -> None:
    before = {
        "started_at": "2026-11-28T10:00:00+00:00",
        "ended_at": "2026-11-28T11:00:00+00:00",
        "outcome": "failed",
        "error": "the disk is full",
        "world_size": 4,
        "failures": [{"time": "2026-11-28T10:30:00+00:00", "line": "rank 3 hung", "restart": True}],
    }
    run = write_run(tmp_path / "run", earlier=[before])
    with see(str(run.path)) as seen:
        said = [event.what for event in seen.events()]
    assert said == [
        "started with 4 workers",
        "rank 3 hung; the workers started again",
        "failed: the disk is full",
        "started with 2 workers",
        "a note",
    ]


def test_a_run_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write_run({"config": {"base_model": "b"}, "started_at": "2026-11-29T16:00:44+00:00"})
    hold(run, this_driver(None))
    progress(run, {"phase": "loading"})
    code, said = status(run.path, capsys)
    assert code == 0 and "loading the model" in said and "checkpoints  none" in said


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        code, said = status(place, capsys)
        assert code == 2 and said.count("\n") == 1 and "no run is here" in said
    assert not (tmp_path / "nowhere").exists()


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outcome="finished", notices=["n" * 5000] * 100)
    command = f"{sys.executable} -m nemo_ray.view.status {run.path} --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n" and done.stderr == ""


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep")
    code, said = status(folder.path, capsys)
    assert (
        code == 0 and "finished, 4 of 5 trials have ended" in said and "best: trial 1, eval_loss 3.0" in said
    )
    found = json.loads(status(folder.path, capsys, "--json")[1])
    assert found["best"] == 1 and len(found["trials"]) == 4


def test_what_no_trial_has_is_left_out_and_the_rest_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [point | {"lora_target_modules": None if n else ["q_proj"]} for n, point in enumerate(POINTS)]
    said = status(write_sweep(tmp_path / "sweep", trials=points).path, capsys)[1]
    head, first, second = (line.split() for line in said.splitlines()[1:4])
    assert "cost" not in head and {"gpu_hours", "reason"} < set(head)
    assert first[-1] == "[q_proj]" and second[-1] == "0.01"
    assert "None" not in said and "NaN" not in said


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as made:
        made.create_bucket("runs")
        yield made


def test_a_run_in_a_store_is_looked_at_only(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = "s3://runs/one"
    stored = StoredRunDir(url)
    write_run(
        stored.path, outcome="finished", failures=[{"time": "", "line": "rank 0 fell", "restart": True}]
    )
    stored.push()
    mark = working_folder(url) / "mark"
    mark.touch()
    code, said = status(url, capsys)
    assert code == 0 and "state        finished" in said and "rank 0 fell" in said and url in said
    assert mark.exists(), "the folder of a run that may be at work here"
    assert main(["report", url]) == 0
    assert capsys.readouterr().out == f"report: {url}/report.html\n"
    assert status("s3://runs/none", capsys) == (
        2,
        "error: s3://runs/none: no run is here (no run.json); name the output_dir of one\n",
    )
