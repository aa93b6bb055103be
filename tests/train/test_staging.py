"""Copies beside training, on a CPU: a copy engine's stand-in makes them some time later, as a GPU's would."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_ray.errors import CheckpointError
from nemo_ray.run_dir import RunDir
from nemo_ray.train import checkpoint, staging
from nemo_ray.train.checkpoint import Checkpointer, TrainState, load_checkpoint
from nemo_ray.train.staging import HostCopies
from tests.e2e.compare import assert_same_rows, train_rows
from tests.group import group_of_one
from tests.train.runs import CPU, Runs
from tests.train.saved import all_tensors, assert_equal, one_process

DELAY_S = 2.0  # several steps


class Held(TorchDispatchMode):
    """Notes copies instead of making them."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.append(args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))


class Engine:
    """A stream whose copies begin late; an event is the thread that makes them."""

    device = CPU
    stuck = False

    def __init__(self) -> None:
        self.made = threading.Thread()

    def begin(self, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        def make() -> None:
            time.sleep(DELAY_S)
            for to, source in copies:
                to.copy_(source)

        self.made = threading.Thread(target=make, daemon=True)
        if not self.stuck:
            self.made.start()

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> threading.Thread:
        return self.made


class Compute:
    def wait_event(self, event: threading.Thread) -> None:
        event.join(60)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextlib.contextmanager
    def on(stream: Engine) -> Iterator[None]:
        with Held() as held:
            yield
        stream.begin(held.copies)

    monkeypatch.setattr(torch.cuda, "Stream", Engine)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", Compute)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(checkpoint, "HostCopies", lambda on_gpu: HostCopies(on_gpu=True))
    yield


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "run")
    run.begin_attempt()
    with group_of_one():
        yield run


def change(parts: Any) -> dict[str, torch.Tensor]:
    """A step of the optimizer; what there was before."""
    before = all_tensors(*parts)
    parts[1].step()
    return before


def test_training_goes_on_while_they_are_made(run: RunDir, engine: None) -> None:
    parts = one_process()
    checkpointer = Checkpointer(run, *parts, None)
    wanted = {}
    for step in (1, 2, 3):
        began_s = time.monotonic()
        checkpointer.start(TrainState(step=step))
        if step > 1:
            assert time.monotonic() - began_s < DELAY_S
            assert run.newest_checkpoint() == run.checkpoint_dir(step - 1)
        checkpointer.hold_changes()
        wanted[step] = change(parts)
        checkpointer.wait()
    for step, tensors in wanted.items():
        again = one_process(number=1)
        load_checkpoint(run.checkpoint_dir(step), *again)
        assert_equal(all_tensors(*again), tensors)


def test_a_run_may_end_while_they_are_made(run: RunDir, engine: None) -> None:
    parts = one_process()
    checkpointer = Checkpointer(run, *parts, None)
    checkpointer.start(TrainState(step=1))
    change(parts)
    wanted = all_tensors(*parts)
    checkpointer.start(TrainState(step=2))
    checkpointer.wait()
    again = one_process(number=1)
    load_checkpoint(run.checkpoint_dir(2), *again)
    assert_equal(all_tensors(*again), wanted)


def test_copies_that_do_not_come(run: RunDir, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_LIMIT_S", 0.2)
    checkpointer = Checkpointer(run, *one_process(), None)
    checkpointer.start(TrainState(step=1))
    checkpointer.wait()
    monkeypatch.setattr(Engine, "stuck", True)
    checkpointer.start(TrainState(step=2))
    with pytest.raises(CheckpointError, match="step-2 could not be written: the GPU did not copy"):
        checkpointer.wait()
    assert run.checkpoint_steps() == [1]


def test_a_run_goes_on_from_one_that_was_copied_beside_it(tmp_path: Path, engine: None) -> None:
    runs = Runs(tmp_path)
    settings = {"save_steps": 2, "test_datasets": [], "eval_steps": None}
    whole = runs.run("whole", **settings)
    run = runs.run("rest", **settings, resume_from_checkpoint=str(whole.checkpoint_dir(4)))
    assert_same_rows(train_rows(run), train_rows(whole)[4:], rtol=1e-6)
