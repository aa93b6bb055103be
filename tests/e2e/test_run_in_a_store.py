"""A run whose output_dir is in an object store: the same course, on any machine."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from nemo_ray.storage import list_files, read_bytes
from nemo_ray.stored_run import StoredRunDir
from tests.e2e.command import TRAIN, Command
from tests.e2e.compare import assert_same_course, assert_same_tensors
from tests.e2e.test_two_drivers import send
from tests.e2e.world import World
from tests.object_store import ObjectStore
from tests.train.tracker_readers import tensorboard_points

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

ADAPTER = "adapter_model.safetensors"


class Machine:
    """A cache folder of its own, as each machine has; all run here."""

    def __init__(self, world: World, cache: Path, url: str) -> None:
        self.world, self.cache, self.url = world, cache, url

    def train(self, **changes: Any) -> Command:
        config = self.world.write_yaml(output_dir=self.url, dataset_prepared_path=None, **changes)
        return self.world.command(*TRAIN, str(config), XDG_CACHE_HOME=str(self.cache))


def seen(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The run as a machine sees it that has nothing but the store; its adapter as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = StoredRunDir(url)
    run.pull()
    for file in list_files(f"{url}/adapter") + list_files(f"{url}/tensorboard"):
        place = run.path / file.removeprefix(f"{url}/")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(read_bytes(file))
    return run


def test_killed_with_its_machine_and_continued_on_another(
    world: World, reference: RunDir, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://runs/killed"
    store.stall_s = 5.0  # shorter than a release waits for a beat that is under way
    store.fail_some(0.03, seed=1)
    two = {"ray": {"num_workers": 2}, "micro_batch_size": 2}
    first = Machine(world, tmp_path / "first", url).train(**two)
    first.wait_until(lambda: "killed/checkpoints/step-4/state.json" in store.objects("runs"))
    first.kill_tree()
    shutil.rmtree(tmp_path / "first")
    elsewhere = Machine(world, tmp_path / "second", url)
    refused = elsewhere.train()
    assert refused.end() == 2
    (line,) = refused.errors
    assert f"output_dir: {url} already holds a run; continue it with resume_from_checkpoint=auto" in line
    second = elsewhere.train(resume_from_checkpoint="auto")
    assert second.end() == 0, second.output
    assert "Traceback" not in second.output and not second.errors, second.output
    assert second.leaves_nothing_behind(), second.tree()
    assert any(
        line.startswith("resumes") and f"{url}/checkpoints/step-" in line
        for line in second.output.splitlines()
    )
    run = seen(url, tmp_path / "third", monkeypatch)
    assert_same_course(run, reference)
    assert_same_tensors(run.adapter_dir / ADAPTER, reference.adapter_dir / ADAPTER)
    assert run.read_run()["outcome"] == "finished" and len(run.read_run()["earlier"]) == 1
    points = tensorboard_points(run.tensorboard_dir)
    assert {step for name, step in points if name == "train/loss"} == set(range(1, 13))
    assert all(len(values) == 1 for values in points.values())
    assert not [file for file in list_files(url) if file.endswith((".driver.json", "/stop"))]
    assert any(request.fault for request in store.requests)


@pytest.mark.soak
def test_interrupted_and_continued_and_replaced(
    world: World, reference: RunDir, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://runs/interrupted"
    machine = Machine(world, tmp_path / "cache", url)
    first = machine.train()
    first.wait_until(lambda: "interrupted/checkpoints/step-4/state.json" in store.objects("runs"))
    pids = list(first.tree())
    send(signal.SIGSTOP, pids)  # else it might end before the second begins
    second = machine.train(resume_from_checkpoint="auto")
    assert second.end() == 2, second.output
    (line,) = second.errors
    assert f"another driver is at work in {url}: process {first.process.pid} on " in line
    first.process.send_signal(signal.SIGINT)
    first.process.send_signal(signal.SIGCONT)
    first.wait_until(lambda: "stopping:" in first.output)
    send(signal.SIGCONT, pids)
    assert first.end() == 130, first.output
    step = max(seen(url, tmp_path / "look", monkeypatch).checkpoint_steps())
    assert f"newest checkpoint: {url}/checkpoints/step-{step}" in first.output
    third = machine.train(resume_from_checkpoint=f"{url}/checkpoints/step-4")
    assert third.end() == 0, third.output
    run = seen(url, tmp_path / "look", monkeypatch)
    assert_same_course(run, reference)
    assert run.checkpoint_steps() == [4, 8, 12]
    fourth = machine.train(overwrite=True, max_steps=2, completion_prompts=[])
    assert fourth.end() == 0, fourth.output
    run = seen(url, tmp_path / "look", monkeypatch)
    assert run.checkpoint_steps() == [2] and run.read_completions() == []
    steps = {file.split("/")[-2] for file in list_files(f"{url}/checkpoints")}
    assert steps == {"step-2"}
