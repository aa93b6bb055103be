"""What a sweep says when it has ended."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.tune.budget import Budget
from nemo_ray.tune.course import Course
from nemo_ray.tune.sweep_dir import SweepDir
from nemo_ray.tune.trial import FAILED, FINISHED, Evaluation
from nemo_ray.tune.words import print_result


def printed(folder: SweepDir, course: Course, price: float | None, gpus: float) -> list[str]:
    section = TuneSection(parameters={"lora_r": [4]}, price_per_gpu_hour=price)
    budget = Budget(section, {"trial_seconds": [3600.0, 1800.0], "elapsed_s": 95.0}, 2, gpus)
    console = Console(file=io.StringIO(), width=200)
    print_result(console, folder, course, {0: {"lora_r": 4}, 1: {"lora_r": 8}}, budget)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def course(tmp_path: Path) -> Course:
    """Two trials that have begun."""
    made = Course(SweepDir(tmp_path / "sweep"), (0, 1), "eval_loss", "min", "none")
    for number in (0, 1):
        made.run(number).path.mkdir(parents=True)
        made.started(number)
    return made


def test_the_best_the_failed_and_what_it_took(course: Course) -> None:
    course.evaluated(0, Evaluation(1, 10, 2.5))
    course.ended(0, FINISHED, "")
    course.ended(1, FAILED, "out of memory")
    lines = printed(course.folder, course, 2.0, 4.0)
    assert "trial 1 failed: out of memory" in lines
    assert "best           trial 0: eval_loss 2.5000 with lora_r=4" in lines
    assert any(line.split() == ["GPU", "hours", "6.00,", "12.00", "in", "all"] for line in lines)
    assert any(line.split() == ["time", "1:35"] for line in lines)
    assert any(line.split() == ["GPU", "hours", "6.00"] for line in printed(course.folder, course, None, 4.0))
    assert not any("GPU" in line for line in printed(course.folder, course, 2.0, 0.0))


def test_a_sweep_without_a_best(course: Course) -> None:
    course.ended(0, FAILED, "a")
    course.ended(1, FAILED, "b")
    lines = printed(course.folder, course, None, 0.0)
    assert not any(line.startswith("best") for line in lines) and any("report" in line for line in lines)
