"""Fewer workers than a step is meant for train the same course."""

import pytest

from tests.e2e.compare import assert_loss_falls, assert_same_adapter, assert_same_course
from tests.train.runs import KilledError, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("elastic"))


LEARNS = {"learning_rate": 0.05, "max_steps": 8}
FOR_THREE = {**LEARNS, "ray": {"num_workers": [1, 3]}, "save_steps": 2}
"""Steps of six packs in micro-batches of two: with two workers one of them has a micro-batch of nothing."""


def test_the_number_of_workers_changes_nothing(runs: Runs) -> None:
    one = runs.run("one", **FOR_THREE)
    whole = runs.run("whole", micro_batch_size=6, **LEARNS)
    assert_loss_falls(whole)
    assert_same_course(one, whole, rtol=1e-5)
    two = runs.run_in_two("two", **FOR_THREE)
    assert_same_course(two, whole, rtol=1e-5)
    assert_same_adapter(two, whole)
    assert (one.read_run()["world_size"], two.read_run()["world_size"]) == (1, 2)


def test_it_may_change_at_a_restart(runs: Runs) -> None:
    with pytest.raises(KilledError):
        runs.run("changing", die_at_evaluation=4, **FOR_THREE)
    changing = runs.run_in_two("changing", resume_from_checkpoint="auto", **FOR_THREE)
    assert_same_course(changing, runs.run("at once", **FOR_THREE), rtol=1e-5)
    assert changing.read_run()["world_size"] == 2
