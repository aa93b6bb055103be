"""A sweep by the real command: its trials are ordinary runs, and what happens to it changes no result."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from nemo_ray.config.load import load_config
from nemo_ray.run_dir import RunDir
from nemo_ray.tune.sweep_dir import SweepDir, TrialEnd
from nemo_ray.tune.trial import FAILED, FINISHED, STOPPED
from tests.e2e.command import TUNE, Command
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1500)]

RATES = [1e-2, 1e-5, 1e30, 2e-2]
"""The reference's; one that learns nothing; one that makes every weight infinite; another good one."""
SWEEP = {"parameters": {"learning_rate": RATES}, "search": "grid", "max_concurrent": 2}


def begin(world: World, name: str, *arguments: str, **changes: Any) -> Command:
    output = str(world.run_dir(name).path)
    config = world.write_yaml(output_dir=output, **{"tune": SWEEP, **changes})
    return world.command(*TUNE, str(config), *arguments)


def folder(world: World, name: str) -> SweepDir:
    return SweepDir(world.run_dir(name).path)


def ends(found: SweepDir) -> list[TrialEnd | None]:
    return [found.read_end(number) for number in range(len(RATES))]


@pytest.fixture(scope="module")
def swept(world: World) -> SweepDir:
    """The sweep that nothing happens to."""
    started = begin(world, "sweep")
    assert started.end(900) == 0, started.output
    assert "Traceback" not in started.output and not started.errors, started.output
    assert "WARNING" not in started.output, "Ray's of many processes"
    assert started.leaves_nothing_behind(), started.tree()
    return folder(world, "sweep")


def test_a_trial_is_the_run_that_its_configuration_makes(swept: SweepDir, reference: RunDir) -> None:
    assert_same_course(swept.trial(0), reference)
    assert_same_adapter(swept.trial(0), reference)
    facts = swept.trial(0).read_run()
    assert facts["outcome"] == FINISHED and facts["config"]["learning_rate"] == RATES[0]


def test_each_trial_says_how_it_ended(swept: SweepDir) -> None:
    good, slow, infinite, other = ends(swept)
    assert good is not None and slow is not None and infinite is not None and other is not None
    assert (good.status, good.evaluation, good.step) == (FINISHED, 2, 12)
    assert (slow.status, slow.rung, slow.evaluation, slow.step) == (STOPPED, 0, 1, 6)
    assert slow.value is not None and good.value is not None and slow.value > good.value
    assert "was wanted to go on" in slow.reason
    assert infinite.status == FAILED and "finite" in infinite.reason
    assert other.status in (FINISHED, STOPPED)
    assert not swept.trial(1).checkpoint_steps() and swept.trial(1).read_metrics()


def test_the_best_trials_result_is_there_with_its_configuration(swept: SweepDir) -> None:
    facts = swept.read()
    values = {end.number: end.value for end in ends(swept) if end is not None and end.status == FINISHED}
    assert facts["best"] == min(values, key=lambda number: values[number] or 0.0)
    best = swept.trial(facts["best"])
    name = "adapter_model.safetensors"
    kept, made = load_file(swept.best_dir / name), load_file(best.adapter_dir / name)
    assert kept.keys() == made.keys() and all(bool((kept[key] == made[key]).all()) for key in kept)
    config = load_config(str(swept.best_dir / "config.yaml")).config
    wanted = best.read_run()["config"] | {"output_dir": f"{swept.path}-best", "resume_from_checkpoint": None}
    assert config.to_dict() == wanted
    assert facts["outcome"] == "finished" and len(facts["trials"]) == len(RATES)


def assert_listed_under_one_run(uri: str, found: SweepDir) -> None:
    """Each trial has one run in MLflow, also those that ran twice, below one of the sweep's."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("mine")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("sweep-killed")
    assert parent.info.run_id == found.read()["mlflow_run_id"] and parent.info.status == "FINISHED"
    assert runs.keys() == {f"sweep-killed-00{number}" for number in range(len(RATES))}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert "eval/loss" in runs["sweep-killed-000"].data.metrics


def test_killed_and_resumed_it_ends_the_same(
    world: World, swept: SweepDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = folder(world, "sweep-killed")
    store = {"mlflow_tracking_uri": f"file://{tmp_path}/store", "mlflow_experiment_name": "mine"}
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    started = begin(world, "sweep-killed", **store)
    started.wait_until(lambda: found.read_end(1) is not None or found.read_end(0) is not None, 600)
    started.kill_tree()
    unfinished = [number for number, end in enumerate(ends(found)) if end is None]
    assert unfinished
    again = begin(world, "sweep-killed", "--resume", **store)
    assert again.end(900) == 0, again.output
    assert found.read()["best"] == swept.read()["best"]
    for mine, other in zip(ends(found), ends(swept), strict=True):
        assert mine is not None and other is not None
        assert (mine.status, mine.evaluation, mine.step, mine.rung) == (
            other.status,
            other.evaluation,
            other.step,
            other.rung,
        )
        assert mine.value == pytest.approx(other.value, rel=1e-5) if mine.value else other.value is None
    assert_same_course(found.trial(0), swept.trial(0), rtol=1e-5)
    assert_listed_under_one_run(store["mlflow_tracking_uri"], found)
    once_more = begin(world, "sweep-killed", "--resume", **store)
    assert once_more.end(120) == 0 and "all trials are done" in once_more.output


def test_trials_that_no_node_has_room_for_are_refused_at_once(world: World) -> None:
    started = begin(world, "sweep-too-large", ray={"resources_per_worker": {"GPU": 1}, "use_gpu": True})
    assert started.end(120) == 1, started.output
    (line,) = started.errors
    assert "do not fit: the cluster has" in line and "0 GPU" in line
    assert not folder(world, "sweep-too-large").path.exists()


@pytest.fixture
def held(world: World, tmp_path: Path) -> Iterator[Path]:
    """A folder in which a sweep lies."""
    path = world.run_dir("sweep-held").path
    path.mkdir(parents=True, exist_ok=True)
    (path / "sweep.json").write_text(json.dumps({"trials": [{"learning_rate": 1.0}], "elapsed_s": 0.0}))
    yield path


def test_what_lies_in_the_folder_stays(world: World, held: Path) -> None:
    for arguments, words in (((), "--resume"), (("--resume",), "other trials")):
        started = begin(world, "sweep-held", *arguments)
        assert started.end(60) == 2, started.output
        (line,) = started.errors
        assert line.startswith("error: output_dir: ") and str(held) in line and words in line
    nothing = begin(world, "sweep-nothing", "--resume")
    assert nothing.end(60) == 2 and "holds no sweep to resume" in nothing.errors[0]
    assert not folder(world, "sweep-nothing").path.exists()
