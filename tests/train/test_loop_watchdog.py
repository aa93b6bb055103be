"""How long each part of a real run may take: the loop tells the watchdog what it is about to do."""

import faulthandler
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemo_ray.data.reader import EvalReader, PackReader
from nemo_ray.run_dir import RunDir
from nemo_ray.train import loop, worker
from nemo_ray.train.checkpoint import Checkpointer
from nemo_ray.train.update import Update
from nemo_ray.train.watchdog import SLOW_FACTOR, WAIT_S, read_rank
from tests.train.runs import KilledError, Runs

TIMEOUT_S = 100.0
WORK, WAIT, SLOW = TIMEOUT_S, TIMEOUT_S + WAIT_S, TIMEOUT_S * SLOW_FACTOR


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("watched"))


class Limits:
    """The watchdog's limit each time that a part of the run begins."""

    def __init__(self, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.patch = run.rank_file(0), monkeypatch
        self.seen: dict[str, set[tuple[str, float]]] = {}

    def at(self, name: str, owner: Any, function: str) -> None:
        original: Callable[..., Any] = getattr(owner, function)
        seen = self.seen.setdefault(name, set())

        def noted(*args: Any, **keys: Any) -> Any:
            told = read_rank(self.file)
            assert told is not None
            seen.add((told[0].phase, told[0].limit_s))
            return original(*args, **keys)

        self.patch.setattr(owner, function, noted)


def test_waits_are_long_and_work_is_short(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(RunDir(runs.folder / "runs" / "limits"), monkeypatch)
    limits.at("reading", PackReader, "next_step")
    limits.at("first all-reduce", loop.Trainer, "_sum_over_workers")
    limits.at("step", Update, "__call__")
    limits.at("reading held-out rows", EvalReader, "next_step")
    limits.at("saving", Checkpointer, "start")
    limits.at("exporting", worker, "export")
    limits.at("building", worker, "make_trainee")
    run = runs.run("limits", save_steps=3, ray={"hang_timeout_s": TIMEOUT_S})
    assert limits.seen == {
        "building": {("loading", SLOW)},
        "reading": {("training", WAIT)},
        "first all-reduce": {("training", WAIT)},
        "step": {("training", WORK)},
        "reading held-out rows": {("evaluating", WAIT)},
        "saving": {("saving", SLOW)},
        "exporting": {("exporting", SLOW)},
    }
    told = read_rank(run.rank_file(0))
    assert told is not None and (told[0].phase, told[0].step, told[0].limit_s) == ("done", 6, 0)


def test_a_batch_of_an_evaluation_is_work(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(RunDir(runs.folder / "runs" / "batches"), monkeypatch)
    limits.at("batch", worker.Trainer.__init__.__globals__["Evaluator"], "_places")
    runs.run("batches", max_steps=1, ray={"hang_timeout_s": TIMEOUT_S})
    assert limits.seen == {"batch": {("evaluating", WORK)}}


def test_nothing_strikes_once_a_worker_has_failed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: armed.append("armed"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append("off"))
    with pytest.raises(KilledError):
        runs.run("failed", die_at_evaluation=2)
    assert armed.count("armed") > 5 and armed[-1] == "off"
