"""A sweep whose output_dir is in an object store: begun on one machine, ended on another."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray.storage import list_files, read_bytes
from nemo_ray.tune import read_result
from nemo_ray.tune.stored_sweep import StoredSweepDir
from nemo_ray.tune.trial import FINISHED, STOPPED
from tests.e2e.command import TUNE, Command
from tests.e2e.compare import assert_each_step_once
from tests.e2e.world import World
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

URL = "s3://runs/sweep"
RATES = [1e-2, 1e-6]
STEPS, EVERY = 6, 3


def begin(world: World, cache: Path, *arguments: str, **section: Any) -> Command:
    """On a machine with a cache folder of its own."""
    tune = {"parameters": {"learning_rate": RATES}, "search": "grid", **section}
    keys = {"max_steps": STEPS, "eval_steps": EVERY, "save_steps": EVERY, "completion_prompts": []}
    config = world.write_yaml(output_dir=URL, dataset_prepared_path=None, tune=tune, **keys)
    return world.command(*TUNE, str(config), *arguments, XDG_CACHE_HOME=str(cache))


def test_killed_with_its_machine_and_continued_on_another(
    world: World, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "look"))
    store.stall_s = 5.0  # shorter than a release waits for a beat that is under way
    store.fail_some(0.02, seed=1)
    first = begin(world, tmp_path / "first", scheduler="pbt")
    first.wait_until(lambda: "sweep/population.json" in store.objects("runs"), 600)
    first.kill_tree()
    shutil.rmtree(tmp_path / "first")
    elsewhere = tmp_path / "second"
    refused = begin(world, elsewhere, scheduler="pbt")
    assert refused.end() == 2
    (line,) = refused.errors
    assert f"output_dir: {URL} already holds a sweep; continue it with --resume" in line
    population = json.loads(read_bytes(f"{URL}/population.json"))
    second = begin(world, elsewhere, "--resume", scheduler="pbt")
    assert second.end(600) == 0, second.output
    assert "Traceback" not in second.output and not second.errors, second.output
    assert second.leaves_nothing_behind(), second.tree()
    assert json.loads(read_bytes(f"{URL}/population.json")) == population, "what was decided stays"
    (change,) = population["changes"]
    assert (change["number"], change["step"]) == (1, EVERY)
    result = read_result(URL)
    assert [(trial.end.status, trial.end.step) for trial in result.trials] == [(FINISHED, STEPS)] * 2
    assert result.best is not None and result.trials[1].params == change["point"]
    folder = StoredSweepDir(URL, tmp_path / "seen")
    folder.pull()
    for number in range(2):
        assert_each_step_once(folder.trial(number), STEPS, [0, EVERY, STEPS])
    best = yaml.safe_load(read_bytes(f"{URL}/best/config.yaml"))
    assert (
        best["learning_rate"] == result.best.params["learning_rate"] and best["output_dir"] == f"{URL}-best"
    )
    name = "adapter_model.safetensors"
    assert read_bytes(f"{URL}/best/{name}") == read_bytes(
        f"{folder.trial_place(result.best.number)}/adapter/{name}"
    )
    assert b"trial 1" in read_bytes(f"{URL}/report.html")
    assert not [file for file in list_files(URL) if file.endswith((".driver.json", "/stop"))]
    assert f"result         {URL}/best" in second.output
    status = world.command(sys.executable, "-m", "nemo_ray.view.status", URL)
    assert status.end(60) == 0 and f"sweep {URL}: finished, 2 of 2 trials have ended" in status.output


@pytest.mark.soak
def test_interrupted_continued_and_replaced(
    world: World, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "look"))
    first = begin(world, tmp_path / "cache", max_concurrent=1)
    first.wait_until(lambda: any("trials/000/metrics" in name for name in store.objects("runs")), 600)
    first.ctrl_c()
    assert first.end(120) == 130, first.output
    assert first.leaves_nothing_behind(), first.tree()
    second = begin(world, tmp_path / "cache", "--resume", max_concurrent=1)
    assert second.end(600) == 0, second.output
    found = read_result(URL)
    assert {trial.end.status for trial in found.trials} == {FINISHED, STOPPED} and len(found.trials) == 2
    stopped = next(trial.number for trial in found.trials if trial.end.status == STOPPED)
    assert not [name for name in store.objects("runs") if f"trials/00{stopped}/checkpoints" in name]
    third = begin(world, tmp_path / "other", "overwrite=true", scheduler="none", max_concurrent=2)
    assert third.end(600) == 0, third.output
    assert {trial.end.status for trial in read_result(URL).trials} == {FINISHED}
