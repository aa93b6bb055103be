"""The driver's parts that need no Ray: how many trials fit, budgets, the table, the folder."""

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.train.resources import Demand
from nemo_ray.tune.budget import Budget, Spent, trained
from nemo_ray.tune.course import Course
from nemo_ray.tune.setup import most_at_once
from nemo_ray.tune.sweep_dir import SweepDir
from nemo_ray.tune.table import SweepDisplay, describe, table
from nemo_ray.tune.trial import FAILED, FINISHED, Evaluation

ONE_CPU = Demand(1, False, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("wanted", "nodes", "most", "fit"),
    [
        (ONE_CPU, [{"CPU": 3.0}], 8, 2),
        (ONE_CPU, [{"CPU": 3.0}], 1, 1),
        (ONE_CPU, [{"CPU": 2.0}], 8, 1),
        (Demand(2, False, {"CPU": 1.0}), [{"CPU": 2.5}, {"CPU": 2.5}], 8, 2),
        (Demand(1, True, {"CPU": 1.0, "GPU": 0.25}), [{"CPU": 16.0, "GPU": 1.0}], 8, 4),
        (
            Demand(2, True, {"CPU": 1.0, "GPU": 1.0}),
            [{"CPU": 9.0, "GPU": 3.0}, {"CPU": 9.0, "GPU": 3.0}],
            8,
            3,
        ),
        (Demand(4, False, {"CPU": 1.0}, at_least=2), [{"CPU": 9.0}], 8, 2),
        (ONE_CPU, [{"CPU": 1.0}], 8, 1),
    ],
)
def test_as_many_trials_at_a_time_as_fit(
    wanted: Demand, nodes: list[dict[str, float]], most: int, fit: int
) -> None:
    """Beside the hundredth of a CPU that each trial's own process takes."""
    assert most_at_once(wanted, nodes, None, most) == fit


def test_steps_and_tokens_of_all_trials_are_counted(tmp_path: Path) -> None:
    course = Course(SweepDir(tmp_path), (0, 1, 2), "eval_loss", "min", "asha")
    for number in (0, 2):
        course.run(number).path.mkdir(parents=True)
        course.run(number).append_metrics({"step": 0, "eval_loss": 1.0})
        course.run(number).append_metrics({"step": 1, "loss": 1.0, "tokens": 100})
        course.run(number).append_metrics({"step": 2, "loss": 1.0, "tokens": 50})
    assert trained(course) == (4, 300)


def printed(course: Course, points: dict[int, dict[str, object]]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(course, points))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_tells_of_all_trials(tmp_path: Path) -> None:
    course = Course(SweepDir(tmp_path), range(5), "eval_loss", "min", "none")
    points: dict[int, dict[str, object]] = {n: {"lora_r": 4 + n, "learning_rate": 1e-4} for n in range(5)}
    for number, value in ((0, 3.0), (1, 2.0), (2, 9.0)):
        course.started(number)
        course.evaluated(number, Evaluation(1, 7, value))
    course.ended(0, FINISHED, "")
    course.ended(1, FINISHED, "")
    course.ended(2, FAILED, "out of memory")
    course.started(3)
    course.run(3).path.mkdir(parents=True)
    course.run(3).write_progress({"step": 5, "loss": 4.5, "tokens_per_s": 1234.0, "eta_s": 65.0})
    lines = printed(course, points).splitlines()
    assert lines[0].split() == [
        "trial",
        "parameters",
        "state",
        "step",
        "loss",
        "eval_loss",
        "tokens/s",
        "ETA",
    ]
    assert lines[1].split() == ["0", "lora_r=4,", "learning_rate=0.0001", "finished", "7", "3.0000"]
    assert "finished, best" in lines[2] and "failed" in lines[3]
    assert lines[4].split()[3:] == ["running", "5", "4.5000", "1,234", "1:05"]
    assert "1 more have not begun" in lines[5]


def test_a_log_gets_a_line_for_each_change(tmp_path: Path) -> None:
    course = Course(SweepDir(tmp_path), range(2), "eval_loss", "min", "none")
    console = Console(file=io.StringIO(), width=120)
    with SweepDisplay(console, course, {0: {"lora_r": 4}, 1: {"lora_r": 8}}) as display:
        for number in range(2):
            course.started(number)
        display.poll()
        display.poll()
        course.evaluated(0, Evaluation(1, 7, 2.5))
        course.ended(0, FINISHED, "")
        course.ended(1, FAILED, "out of memory")
        display.poll()
        display.poll()
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "trial 0: lora_r=4",
        "trial 1: lora_r=8",
        "trial 0 finished with eval_loss 2.5000",
        "trial 1 failed: out of memory",
    ]


def test_points_are_shown_short() -> None:
    point = {"lora_r": 16, "learning_rate": 0.00123456, "lora_target_modules": ["q_proj", "k_proj"]}
    assert describe(point).startswith("lora_r=16, learning_rate=0.00123, lora_target_modules=")


def test_the_best_result_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = SweepDir(tmp_path)
    for number in range(2):
        run = folder.trial(number)
        run.adapter_dir.mkdir(parents=True)
        (run.adapter_dir / "adapter_config.json").write_text(str(number))
    (folder.trial(0).adapter_dir / "only-in-0").touch()
    folder.publish_best(0, {"learning_rate": 1.0})
    assert (folder.best_dir / "only-in-0").exists()
    folder.publish_best(1, {"learning_rate": 2.0})
    assert not (folder.best_dir / "only-in-0").exists()
    assert (folder.best_dir / "adapter_config.json").read_text() == "1"
    assert yaml.safe_load((folder.best_dir / "config.yaml").read_text()) == {"learning_rate": 2.0}


def test_an_empty_or_prepared_folder_is_free(tmp_path: Path) -> None:
    folder = SweepDir(tmp_path / "sweep")
    assert folder.foreign_entries() == []
    (folder.path / "prepared").mkdir(parents=True)
    (folder.path / ".driver.json").touch()
    assert folder.foreign_entries() == []
    (folder.path / "thesis.tex").touch()
    assert folder.foreign_entries() == ["thesis.tex"]


class Clock:
    """Stands where a test puts it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def budget(earlier: dict[str, Any], gpus: float = 0.0, **limits: Any) -> tuple[Budget, Clock]:
    clock = Clock()
    return Budget(TuneSection(parameters={"lora_r": [1]}, **limits), earlier, 3, gpus, clock), clock


def test_a_budget_counts_earlier_starts(tmp_path: Path) -> None:
    course = Course(SweepDir(tmp_path), (0,), "eval_loss", "min", "asha")
    found, clock = budget({"elapsed_s": 1800.0}, max_hours=1.0, max_tokens=10)
    assert found.elapsed_s == 1800.0 and not found.over(course)
    clock.now_s += 1799.0
    assert not found.over(course)
    clock.now_s += 1.0
    assert found.over(course) == "tune.max_hours: 1 are over"
    course.run(0).path.mkdir(parents=True)
    course.run(0).append_metrics({"step": 1, "loss": 1.0, "tokens": 10})
    assert budget({}, max_tokens=10)[0].over(course) == "tune.max_tokens: 10 are trained"
    assert budget({}, max_steps=1)[0].over(course) == "tune.max_steps: 1 are trained"
    assert not budget({}, max_steps=2, max_tokens=11)[0].over(course)
    assert not budget({"elapsed_s": 1e9})[0].over(course)


def test_what_trials_cost_is_counted_over_all_starts(tmp_path: Path) -> None:
    course = Course(SweepDir(tmp_path), (0, 1, 2), "eval_loss", "min", "asha")
    limits = {"max_cost": 6.0, "price_per_gpu_hour": 2.0}
    found, clock = budget({}, 0.5, **limits)
    found.count({0})
    clock.now_s += 3600.0
    found.count({0, 1})
    clock.now_s += 3600.0
    found.count({1})
    assert found.spent.seconds == {0: 3600.0, 1: 7200.0}
    assert found.spent.gpu_hours() == 1.5 and found.spent.cost(1) == 2.0 and not found.over(course)
    again, clock = budget(found.facts(), 0.5, **limits)
    clock.now_s += 3 * 3600.0
    again.count({2})
    assert again.over(course) == "tune.max_cost: 6 are spent"
    section = TuneSection(parameters={"lora_r": [1]}, **limits).model_dump(mode="json")
    recorded = Spent.of({**again.facts(), "tune": section})
    assert recorded == again.spent and recorded.cost() == 6.0
    assert budget({}, 0.5)[0].spent.cost() is None and budget({}, 0.0, **limits)[0].spent.cost() is None
