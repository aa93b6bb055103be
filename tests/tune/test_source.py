"""Trials that are proposed as others end: the same whoever is faster, and the same again after a resume."""

import random
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.tune.course import Course
from nemo_ray.tune.load import Sweep, Trial, load_sweep
from nemo_ray.tune.source import Proposed, recall
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import SweepDir
from nemo_ray.tune.trial import FAILED, FINISHED, Evaluation

LAG = 3
PARAMETERS = {"learning_rate": {"loguniform": [1e-5, 1e-1]}, "lora_r": [4, 8, 16]}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load(tmp_path, PARAMETERS)


def load(tmp_path: Path, parameters: dict[str, Any]) -> Sweep:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "rows.jsonl").touch()
    keys: dict[str, Any] = {
        "base_model": str(tmp_path / "base"),
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
        "adapter": "lora",
        "lora_target_modules": ["q_proj"],
        "output_dir": str(tmp_path / "out"),
    }
    tune = {"parameters": parameters, "search": "optuna", "num_trials": 12, "scheduler": "none", "seed": 5}
    return load_sweep({**keys, "tune": tune})


def begin(sweep: Sweep, folder: Path, points: dict[int, Point], refused: int = -1) -> tuple[Course, Proposed]:
    course = Course(SweepDir(folder), range(sweep.num_trials), "eval_loss", "min", "none")

    def finish(trial: Trial) -> Config:
        if trial.number == refused:
            raise ConfigError(f"trial {trial.number}: does not fit\nat all")
        return trial.config

    return course, Proposed(sweep, course, points, LAG, finish)


def play(
    course: Course, source: Proposed, points: dict[int, Point], draw: random.Random, most: int = 99
) -> None:
    """LAG trials at a time, which end in a drawn order; at most so many of them."""
    running: list[int] = []
    while most:
        while len(running) < LAG:
            try:
                found = source.next()
            except StopIteration:
                break
            if found is None:
                break
            number, config, _ = found
            assert config.learning_rate == points[number]["learning_rate"]
            running.append(number)
            course.started(number)
        if not running:
            break
        number = running.pop(draw.randrange(len(running)))
        course.run(number).path.mkdir(parents=True, exist_ok=True)
        course.run(number).append_metrics({"step": 10, "eval_loss": points[number]["learning_rate"]})
        course.evaluated(number, Evaluation(1, 10, points[number]["learning_rate"]))
        course.ended(number, FINISHED, "")
        most -= 1


def test_proposals_do_not_depend_on_who_is_faster(sweep: Sweep, tmp_path: Path) -> None:
    found = []
    for seed in range(4):
        points: dict[int, Point] = {}
        course, source = begin(sweep, tmp_path / str(seed), points)
        play(course, source, points, random.Random(seed))
        assert sorted(points) == list(range(12)) and not course.left()
        found.append(points)
    assert all(points == found[0] for points in found)
    assert len({str(point) for point in found[0].values()}) == 12


def test_a_resumed_sweep_proposes_the_same(sweep: Sweep, tmp_path: Path) -> None:
    whole: dict[int, Point] = {}
    play(*begin(sweep, tmp_path / "whole", whole), whole, random.Random(0))
    points: dict[int, Point] = {}
    play(*begin(sweep, tmp_path / "killed", points), points, random.Random(1), most=5)
    for number in range(3, max(points) + 1):  # they began, some ended, and nobody noted their points
        del points[number]
    course = Course(SweepDir(tmp_path / "killed"), range(12), "eval_loss", "min", "none")
    course.restore()
    recall(sweep, course, points, LAG)
    assert course.ends.keys() <= points.keys()
    source = Proposed(sweep, course, points, LAG, lambda trial: trial.config)
    play(course, source, points, random.Random(2))
    assert points == whole


def test_a_proposal_that_cannot_be_trained_is_a_trial_that_failed(sweep: Sweep, tmp_path: Path) -> None:
    points: dict[int, Point] = {}
    course, source = begin(sweep, tmp_path / "refused", points, refused=4)
    play(course, source, points, random.Random(0))
    assert course.ends[4].status == FAILED and course.ends[4].reason == "trial 4: does not fit; at all"
    assert [end.status for number, end in sorted(course.ends.items()) if number != 4] == [FINISHED] * 11
    assert sorted(points) == list(range(12))


def test_a_formula_that_fails_somewhere_costs_that_trial(tmp_path: Path) -> None:
    formula = {"warmup_steps": {"quniform": [10, 30, 10]}, "lora_alpha": "800 / (warmup_steps - 20) ** 2"}
    sweep = load(tmp_path, PARAMETERS | formula)
    points: dict[int, Point] = {}
    course, source = begin(sweep, tmp_path / "sweep", points)
    play(course, source, points, random.Random(0))
    failed = [number for number, end in course.ends.items() if end.status == FAILED]
    assert failed and "lora_alpha" in course.ends[failed[0]].reason and len(course.ends) == 12
    assert points.keys() == set(range(12)) - set(failed)
    again = dict(points)
    recall(sweep, course, again, LAG)
    assert again == points


def test_both_ends_of_the_space_are_checked_before_anything_starts(sweep: Sweep) -> None:
    rates = {trial.config.learning_rate for trial in sweep.probes}
    assert rates == {1e-5, 1e-1} and {trial.config.lora_r for trial in sweep.probes} == {4, 8, 16}
    raw = {**sweep.base.config.to_dict(), "tune": {"parameters": {"lora_r": [4, -1]}, "search": "optuna"}}
    with pytest.raises(ConfigError, match="lora_r=-1.*lora_r: -1 is not valid"):
        load_sweep({name: value for name, value in raw.items() if value is not None})
