"""What is shown while a run is under way."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from nemo_ray.run_dir import RunDir
from nemo_ray.train.progress import MetricsTail, ProgressDisplay, duration, status_line


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def plain(run: RunDir) -> tuple[ProgressDisplay, io.StringIO, Clock]:
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=False, width=40, highlight=False)
    return ProgressDisplay(console, run, live=False, clock=clock), output, clock


def at(step: int, **more: object) -> dict[str, object]:
    figures = {
        "step": step,
        "max_steps": 100,
        "loss": 2.5,
        "lr": 1e-4,
        "tokens_per_s": 12345.6,
        "eta_s": 83.0,
    }
    return {"phase": "training", **figures, **more}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (83.4, "1:23"), (3599.6, "1:00:00"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_line_shows_what_is_known() -> None:
    line = status_line(at(12, eval_loss=2.75))
    assert line == "step 12/100  loss 2.5000  held-out 2.7500  lr 1.00e-04  12,346 tokens/s  ETA 1:23"
    rows = status_line({"phase": "training", "step": 12, "max_steps": None, "progress": 0.34, "loss": 2.5})
    assert rows == "step 12 (34%)  loss 2.5000"
    assert status_line({"phase": "loading"}) == "loading the model"
    assert status_line({"phase": "starting 2 workers"}) == "starting 2 workers"
    waiting = {"phase": "training", "windows_done": 3, "windows_total": 40}
    assert status_line(waiting) == "training  data 3/40 windows"
    assert "data" not in status_line({**waiting, "windows_done": 40})


def test_the_tail_tells_each_step_once_also_after_going_back(run: RunDir) -> None:
    tail = MetricsTail(run)
    assert tail.new_rows() == []
    for step in range(1, 4):
        run.append_metrics({"step": step, "loss": 1.0})
    assert [row["step"] for row in tail.new_rows()] == [1, 2, 3]
    assert tail.new_rows() == []
    run.truncate_metrics(2)
    run.append_metrics({"step": 3, "loss": 1.0})
    run.append_metrics({"step": 3, "eval_loss": 1.0})
    run.append_metrics({"step": 4, "loss": 1.0})
    told = tail.new_rows()
    assert [(row["step"], "eval_loss" in row) for row in told] == [(3, True), (4, False)]


def test_the_tail_waits_for_the_rest_of_a_line(run: RunDir) -> None:
    tail = MetricsTail(run)
    run.metrics_file.write_text('{"step": 1, ')
    assert tail.new_rows() == []
    with open(run.metrics_file, "a") as file:
        file.write('"loss": 2}\n')
    assert tail.new_rows() == [{"step": 1, "loss": 2}]


def test_a_log_file_stays_calm(run: RunDir) -> None:
    display, output, clock = plain(run)
    with display:
        display.stage("starting 2 workers")
        for step in range(1, 101):
            clock.now_s += 0.5
            run.write_progress(at(step))
            for _ in range(3):
                display.poll()
        run.write_progress({**at(100), "phase": "done"})
        display.poll()
    lines = output.getvalue().splitlines()
    assert lines[0] == "starting 2 workers"
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:]]
    assert steps == [1, 21, 41, 61, 81, 100]  # every 10 s, and the last one
    assert (
        "\x1b" not in output.getvalue() and max(map(len, lines)) > 40
    )  # unbroken though the file is "narrow"


def test_events_are_told_at_once_and_once(run: RunDir) -> None:
    display, output, clock = plain(run)
    with display:
        display.poll()
        run.write_run({"model": {"total": 1000, "trainable": 25}})
        run.append_metrics({"step": 0, "eval_loss": 3.0})
        run.write_progress(at(0, phase="evaluating"))
        folder = run.checkpoint_dir(10)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        for _ in range(5):
            clock.now_s += 2.0
            display.poll()
    lines = output.getvalue().splitlines()
    assert lines == [
        "model: 1,000 parameters, 25 of them trained (2.50%)",
        "held-out loss 3.0000 at step 0",
        "checkpoint step-10",
    ]


def test_losses_by_dataset_and_a_tracker_that_fails_are_told(run: RunDir) -> None:
    display, output, clock = plain(run)
    row = {"step": 0, "eval_loss": 3.0, "eval_datasets": {"chats": {"loss": 2.5, "tokens": 7}}}
    with display:
        run.write_run({"model": {"total": 1000, "trainable": 25}, "notices": ["slow"]})
        run.append_metrics(row)
        run.write_progress(at(0, phase="evaluating"))
        display.poll()
        two = {**row["eval_datasets"], "texts": {"loss": 3.5, "tokens": 7}}  # type: ignore[dict-item]
        run.append_metrics({**row, "step": 2, "eval_datasets": two})
        run.update_run({"notices": ["slow", "MLflow: not reachable"]})
        for _ in range(3):
            clock.now_s += 2.0
            display.poll()
    assert output.getvalue().splitlines()[1:] == [
        "note: slow",
        "held-out loss 3.0000 at step 0",
        "held-out loss 3.0000 at step 2 (chats 2.5000, texts 3.5000)",
        "note: MLflow: not reachable",
    ]


def test_a_step_without_a_finite_loss_is_shown_without_one(run: RunDir) -> None:
    display, output, clock = plain(run)
    with display:
        for step, loss in ((1, 2.5), (2, None), (3, 2.25)):
            clock.now_s += 20.0
            run.append_metrics({"step": step, "loss": loss, "lr": 1e-4, "tokens_per_s": 12345.6})
            run.write_progress(at(step, loss=loss))
            display.poll()
    rest = "lr 1.00e-04  12,346 tokens/s  ETA 1:23"
    assert output.getvalue().splitlines() == [
        f"step 1/100  loss 2.5000  {rest}",
        f"training  step 2/100  {rest}",
        f"step 3/100  loss 2.2500  {rest}",
    ]


def test_what_a_continued_run_wrote_before_is_not_news(run: RunDir) -> None:
    run.append_metrics({"step": 0, "eval_loss": 3.0})
    run.append_metrics({"step": 12, "eval_loss": 2.9})  # after the checkpoint: will be trained again
    folder = run.checkpoint_dir(10)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    display, output, _ = plain(run)
    with display:
        display.poll()
        run.truncate_metrics(10)
        run.append_metrics({"step": 12, "eval_loss": 2.8})
        display.poll()
    assert output.getvalue().splitlines() == ["held-out loss 2.8000 at step 12"]


def test_a_lost_worker_is_told(run: RunDir) -> None:
    display, output, _ = plain(run)
    with display:
        run.write_progress(at(5))
        display.poll()
        assert display.phase == "training"
        run.write_progress({"phase": "loading"})
        display.poll()
        display.poll()
    assert output.getvalue().count("a worker was lost: starting again from the beginning") == 1


def test_a_terminal_gets_one_line_that_is_repainted(run: RunDir) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, highlight=False)
    with ProgressDisplay(console, run, live=True) as display:
        display.stage("starting 2 workers")
        for step in (1, 2):
            run.write_progress(at(step))
            display.poll()
    text = output.getvalue()
    assert "\r\x1b[2K" in text and "step 2/100" in text
    assert text.count("\n") <= 1  # nothing scrolls
