"""What a sweep makes of its trials' figures: the same in any order, before and after a restart."""

import random
from pathlib import Path

import pytest

from nemo_ray.tune.course import ALIKE, Course
from nemo_ray.tune.sweep_dir import SweepDir
from nemo_ray.tune.trial import FAILED, FINISHED, STOPPED, Evaluation

LOSSES = {0: [5.0, 4.0, 3.5, 3.2], 1: [4.8, 4.1, 3.7, 3.6], 2: [6.0, 5.9, 5.8, 5.7], 3: [4.5, 3.9, 3.4, 3.1]}
STEPS = 10


def course(path: Path, scheduler: str = "asha", mode: str = "min") -> Course:
    return Course(SweepDir(path), LOSSES, "eval_loss", mode, scheduler)


def write_rows(course: Course, number: int, count: int) -> None:
    """What its workers leave behind."""
    run = course.run(number)
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics_file.unlink(missing_ok=True)
    run.append_metrics({"step": 0, "eval_loss": 9.0})
    for index, value in enumerate(LOSSES[number][:count]):
        run.append_metrics({"step": STEPS * (index + 1), "eval_loss": value})


def tell(course: Course, number: int, index: int) -> None:
    course.evaluated(number, Evaluation(index + 1, STEPS * (index + 1), LOSSES[number][index]))


def play(course: Course, draw: random.Random, most: int = 1000) -> None:
    """Trials that evaluate and end in a drawn order; those that have to stop do so when it is their turn."""
    told = {number: len(course.evaluations[number]) for number in course.left()}
    for number in told:
        course.started(number)
    while told and most:
        most -= 1
        number = draw.choice(sorted(told))
        if number not in course.left() or told[number] == len(LOSSES[number]):
            course.ended(number, FINISHED if told[number] == len(LOSSES[number]) else STOPPED, "")
            del told[number]
            continue
        write_rows(course, number, told[number] + 1)
        tell(course, number, told[number])
        told[number] += 1


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_events_changes_nothing(tmp_path: Path, seed: int) -> None:
    one, other = course(tmp_path / "one"), course(tmp_path / "other")
    play(one, random.Random(0))
    play(other, random.Random(seed))
    assert one.ends == other.ends and not one.left()
    assert {number: end.status for number, end in one.ends.items()} == {
        0: FINISHED,
        1: STOPPED,
        2: STOPPED,
        3: FINISHED,
    }
    assert one.best() == 3
    assert (one.ends[2].evaluation, one.ends[2].value, one.ends[2].rung) == (1, 6.0, 0)
    assert (one.ends[1].evaluation, one.ends[1].value, one.ends[1].rung) == (3, 3.7, 1)


@pytest.mark.parametrize("most", range(1, 18))
def test_killed_and_restored_it_ends_the_same(tmp_path: Path, most: int) -> None:
    whole, broken = course(tmp_path / "whole"), course(tmp_path / "broken")
    play(whole, random.Random(0))
    play(broken, random.Random(1), most)
    again = course(tmp_path / "broken")
    again.restore()
    play(again, random.Random(2))
    assert again.ends == whole.ends and again.best() == whole.best()


def test_without_a_scheduler_every_trial_ends_by_itself(tmp_path: Path) -> None:
    one = course(tmp_path, scheduler="none")
    play(one, random.Random(0))
    assert {end.status for end in one.ends.values()} == {FINISHED}
    assert course(tmp_path, scheduler="none").folder.read_end(2) == one.ends[2]


def test_more_may_be_better(tmp_path: Path) -> None:
    one = course(tmp_path, scheduler="none", mode="max")
    play(one, random.Random(0))
    assert one.best() == 2


def test_a_trial_that_a_signal_ended_is_left_to_do(tmp_path: Path) -> None:
    one = course(tmp_path)
    one.started(0)
    tell(one, 0, 0)
    one.close("stopped")
    one.ended(0, STOPPED, "")
    assert 0 in one.left() and one.folder.read_end(0) is None


def test_those_that_have_to_end_are_asked_until_they_did(tmp_path: Path) -> None:
    one = course(tmp_path)
    for number in (0, 1, 2):
        one.started(number)
        write_rows(one, number, 1)
        one.run(number).write_run({})
        tell(one, number, 0)
    one.ask()
    assert one.run(2).stop_requested() and not one.run(0).stop_requested()
    one.run(2).clear_stop()  # as a run does at its start
    one.ask()
    assert one.run(2).stop_requested()
    one.close("over")
    one.ask()
    assert one.run(0).stop_requested()


def test_trials_that_all_fail_alike_end_the_sweep(tmp_path: Path) -> None:
    one = course(tmp_path)
    for number in range(ALIKE):
        assert not one.closed
        one.started(number)
        one.ended(number, FAILED, "error: no such file")
    assert "no such file" in one.closed and one.best() is None


def test_a_failure_among_others_does_not(tmp_path: Path) -> None:
    one = course(tmp_path)
    for number, reason in enumerate(["a", "b", "a", "a"]):
        one.started(number)
        one.ended(number, FAILED, reason)
    assert not one.closed and one.ends[1].reason == "b"


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    one = course(tmp_path, scheduler="none")
    for number, value in ((0, float("nan")), (1, 2.0)):
        one.started(number)
        one.evaluated(number, Evaluation(1, 1, value))
        one.ended(number, FINISHED, "")
    assert one.best() == 1
    found = SweepDir(tmp_path).read_end(0)
    assert found is not None and found.value is None


def test_trials_that_fail_alike_beside_others_that_train_end_no_sweep(tmp_path: Path) -> None:
    """Of a population nobody ends before the last generation."""
    beside = course(tmp_path, "pbt")
    write_rows(beside, 3, 1)
    tell(beside, 3, 0)
    for number in range(ALIKE):
        beside.ended(number, FAILED, "its disk is full")
    assert not beside.closed
    again = course(tmp_path, "pbt")
    again.restore()
    assert not again.closed and again.left() == [3]
