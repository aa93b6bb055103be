"""Checkpoints: written beside training, exact on any sharding, and never half there."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.errors import CheckpointError, SupersededError
from nemo_ray.run_dir import RunDir
from nemo_ray.train import checkpoint_files
from nemo_ray.train.checkpoint import Checkpointer, TrainState, load_checkpoint, load_weights
from nemo_ray.train.checkpoint_files import damage
from tests.e2e.compare import assert_same_course
from tests.group import group_of_one
from tests.train.runs import KilledError, Runs
from tests.train.saved import all_tensors, assert_equal, one_process, save


@pytest.fixture
def group() -> Iterator[None]:
    with group_of_one():
        yield


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.begin_attempt()
    return run


# -- exact ----------------------------------------------------------------------------------------


def test_weights_alone(run: RunDir, group: None) -> None:
    parts, again = one_process(), one_process(number=1)
    states = all_tensors({}, again[1])
    save(run, parts, step=3)
    load_weights(run.checkpoint_dir(3), again[0])
    assert_equal(
        {name: p.detach() for name, p in again[0].items()}, {n: p.detach() for n, p in parts[0].items()}
    )
    assert_equal(all_tensors({}, again[1]), states)


# -- beside training ------------------------------------------------------------------------------


@pytest.fixture
def held_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk takes nothing until the event is set."""
    let_go, fsync = threading.Event(), os.fsync

    def wait(handle: int) -> None:
        assert let_go.wait(60)
        fsync(handle)

    monkeypatch.setattr(checkpoint_files.os, "fsync", wait)
    yield let_go
    let_go.set()


def test_training_goes_on_while_it_is_written(run: RunDir, group: None, held_disk: threading.Event) -> None:
    parts = one_process()
    wanted = all_tensors(*parts)
    state = TrainState(step=1, data_hash="then")
    checkpointer = Checkpointer(run, *parts, None)
    checkpointer.start(state)
    state.step, state.data_hash = 2, "later"
    parts[1].step()  # in place, while the file is open
    checkpointer.check()
    assert run.newest_checkpoint() is None
    held_disk.set()
    checkpointer.wait()
    assert run.checkpoint_steps() == [1]
    again = one_process(number=1)
    loaded = load_checkpoint(run.checkpoint_dir(1), *again)
    assert (loaded.step, loaded.data_hash) == (1, "then")
    assert_equal(all_tensors(*again), wanted)


def test_each_of_several_is_what_trained_then(run: RunDir, group: None) -> None:
    parts = one_process()
    checkpointer = Checkpointer(run, *parts, None)
    then = {}
    for step in (1, 2, 3):
        parts[1].step()
        checkpointer.start(TrainState(step=step))
        then[step] = {name: tensor.clone() for name, tensor in all_tensors(*parts).items()}
    checkpointer.wait()
    for step, wanted in then.items():
        again = one_process(number=1)
        load_checkpoint(run.checkpoint_dir(step), *again)
        assert_equal(all_tensors(*again), wanted)


def test_a_newer_start_keeps_the_older_ones_checkpoint_from_its_name(
    run: RunDir, group: None, held_disk: threading.Event
) -> None:
    checkpointer = Checkpointer(run, *one_process(), None)
    checkpointer.start(TrainState(step=1))
    newer = RunDir(run.path)
    newer.begin_attempt()
    held_disk.set()
    with pytest.raises(SupersededError):
        checkpointer.wait()
    with pytest.raises(SupersededError):
        save(run, one_process(), step=2)
    assert newer.newest_checkpoint() is None
    save(newer, one_process(), step=1)
    assert newer.checkpoint_steps() == [1]


def test_old_ones_go_when_the_new_one_is_there(run: RunDir, group: None, held_disk: threading.Event) -> None:
    parts = one_process()
    held_disk.set()
    for step in (1, 2, 3):
        save(run, parts, step, keep=1)
        assert run.checkpoint_steps() == [step]
    held_disk.clear()
    checkpointer = Checkpointer(run, *parts, 1)
    checkpointer.start(TrainState(step=4))
    assert run.checkpoint_steps() == [3]  # the last good one, for as long as there is no other
    held_disk.set()
    checkpointer.wait()
    assert run.checkpoint_steps() == [4]


# -- damage ---------------------------------------------------------------------------------------


def test_what_the_disk_does_not_give_back_gets_no_name(
    run: RunDir, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = one_process()
    save(run, parts, step=1, keep=1)
    write_all: Any = checkpoint_files._write_all
    monkeypatch.setattr(checkpoint_files, "_write_all", lambda handle, data: write_all(handle, data[:-1]))
    with pytest.raises(CheckpointError, match=r"step-2 could not be written: .*gives back other bytes"):
        save(run, parts, step=2, keep=1)
    assert run.checkpoint_steps() == [1] and damage(run.checkpoint_dir(1), 0, 1) is None
    assert not run.own_attempt.aside(run.checkpoint_dir(2)).exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, os.unlink])
@pytest.mark.parametrize("name", ["rank-0.safetensors", "tensors.json"])
def test_every_damage_is_found(run: RunDir, group: None, harm: Any, name: str) -> None:
    save(run, one_process(), step=1)
    folder = run.checkpoint_dir(1)
    assert [damage(folder, part, 3) for part in range(3)] == [None, None, None]
    harm(folder / name)
    assert name in str(damage(folder, 0, 1))
    assert sum(damage(folder, part, 3) is not None for part in range(3)) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> RunDir:
    return runs.run("uninterrupted", save_steps=2)


def killed_at_6(runs: Runs, name: str) -> RunDir:
    """Checkpoints of steps 2 and 4 are there; that of 6 is not."""
    with pytest.raises(KilledError):
        runs.run(name, save_steps=2, die_at_evaluation=6)
    run = RunDir(runs.folder / "runs" / name)
    assert run.checkpoint_steps() == [2, 4]
    return run


@pytest.mark.parametrize("harm", [truncate, flip], ids=["truncated", "changed"])
def test_a_damaged_one_is_set_aside_and_the_one_before_it_goes_on(
    runs: Runs, uninterrupted: RunDir, harm: Any, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    run = killed_at_6(runs, name)
    harm(run.checkpoint_dir(4) / "rank-0.safetensors")
    runs.run(name, save_steps=2, resume_from_checkpoint="auto")
    assert_same_course(run, uninterrupted, rtol=1e-6)
    (notice,) = run.read_run()["notices"]
    assert notice.startswith("checkpoint step-4 is damaged: ") and "going on from step-2" in notice
    (aside,) = run.checkpoints_dir.glob("step-4.damaged-*")
    assert aside.is_dir() and run.checkpoint_steps() == [2, 4, 6]


def test_a_damaged_one_that_was_asked_for_is_refused(runs: Runs) -> None:
    run = killed_at_6(runs, "asked for")
    truncate(run.checkpoint_dir(4) / "rank-0.safetensors")
    with pytest.raises(CheckpointError, match=r"step-4 is damaged: rank-0.safetensors has .* bytes"):
        runs.run("asked for", resume_from_checkpoint=str(run.checkpoint_dir(4)))
    assert run.checkpoint_steps() == [2, 4]
