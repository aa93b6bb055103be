"""An hour of faults drawn at random from a seed; every round ends with the uninterrupted run's losses.

make soak                                     an hour, from seed 0
SOAK_SECONDS=900 SOAK_SEED=7 make soak        shorter, others
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.command import Command
from tests.e2e.compare import assert_loss_falls, assert_same_adapter, assert_same_course, train_rows
from tests.e2e.world import World

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
ROUND = {
    "max_steps": 120,
    "save_steps": 5,
    "save_total_limit": 3,
    "eval_steps": 40,
    "learning_rate": 3e-3,
    "micro_batch_size": 2,
    "sequence_len": 128,
    "completion_prompts": [],
    "ray": {"num_workers": 2, "max_failures": 10},
}
GOES_ON_WITHIN_S = 300.0
"""A frozen worker is given up after a minute; the machine may be busy."""
pytestmark = [pytest.mark.soak, pytest.mark.timeout(2 * SECONDS + 1800)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("soak"))
    yield made
    made.end()


# -- faults: each returns whether the command ends by it ---------------------------------------------


def pids(started: Command, title: str) -> list[int]:
    return sorted(pid for pid, found in started.tree().items() if found.startswith(title))


def kill_a_worker(started: Command, run: RunDir, draw: random.Random) -> bool:
    workers = pids(started, "ray::RayTrainWorker")
    if workers:
        send(draw.choice(workers), signal.SIGKILL)
    return False


def kill_both_workers(started: Command, run: RunDir, draw: random.Random) -> bool:
    for worker in pids(started, "ray::RayTrainWorker"):
        send(worker, signal.SIGKILL)
    return False


def freeze_a_worker(started: Command, run: RunDir, draw: random.Random) -> bool:
    workers = pids(started, "ray::RayTrainWorker")
    if workers:
        send(draw.choice(workers), signal.SIGSTOP)
    return False


def kill_everything(started: Command, run: RunDir, draw: random.Random) -> bool:
    started.kill_tree()
    return True


def kill_the_driver(started: Command, run: RunDir, draw: random.Random) -> bool:
    send(started.process.pid, signal.SIGKILL)  # its workers may live on while the next driver begins
    return True


def ctrl_c(started: Command, run: RunDir, draw: random.Random) -> bool:
    started.ctrl_c()
    return True


def terminate(started: Command, run: RunDir, draw: random.Random) -> bool:
    send(started.process.pid, signal.SIGTERM)
    return True


def damage_the_newest_checkpoint(started: Command, run: RunDir, draw: random.Random) -> bool:
    started.kill_tree()
    newest = run.newest_checkpoint()
    if newest is not None:
        file = draw.choice(sorted(newest.glob("rank-*.safetensors")))
        os.truncate(file, draw.randrange(file.stat().st_size))
    return True


Fault = Callable[[Command, RunDir, random.Random], bool]
FAULTS: dict[Fault, int] = {
    kill_a_worker: 5,
    kill_both_workers: 2,
    freeze_a_worker: 1,
    kill_everything: 3,
    kill_the_driver: 3,
    ctrl_c: 2,
    terminate: 1,
    damage_the_newest_checkpoint: 2,
}
"""And how often each is drawn."""


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # gone by itself meanwhile
        return


# -- rounds -------------------------------------------------------------------------------------------


def test_an_hour_of_random_faults(world: World) -> None:
    reference = world.finished("reference", **ROUND)
    assert_loss_falls(reference)
    draw, until, happened = random.Random(SEED), time.monotonic() + SECONDS, Counter[str]()
    number = 0
    while time.monotonic() < until:
        run = one_round(world, f"round-{number}", draw, until, happened)
        assert_same_course(run, reference)
        assert_same_adapter(run, reference)
        number += 1
        print(f"round {number} ended as the uninterrupted run; so far: {dict(happened)}", flush=True)
    assert happened, "no fault happened"


def one_round(world: World, name: str, draw: random.Random, until: float, happened: "Counter[str]") -> RunDir:
    """One run under faults, started again whenever it ended by one, to its end."""
    run = world.run_dir(name)
    while True:
        started = world.train(name, "resume_from_checkpoint=auto", **ROUND)
        if end_of(started, run, draw, until, happened):
            return run


def end_of(
    started: Command, run: RunDir, draw: random.Random, until: float, happened: "Counter[str]"
) -> bool:
    """Let faults happen to a started command, some steps apart; whether it came to its own end."""
    while True:
        ahead = len(train_rows(run)) + draw.randrange(1, 40)
        goes_on = time.monotonic() + GOES_ON_WITHIN_S
        best = 0
        while len(train_rows(run)) < ahead or time.monotonic() > until:
            if started.process.poll() is not None:
                assert started.process.returncode == 0, started.output
                return True
            if len(train_rows(run)) > best or run.read_progress().get("phase") != "training":
                best = max(best, len(train_rows(run)))
                goes_on = max(goes_on, time.monotonic() + GOES_ON_WITHIN_S)
            assert time.monotonic() < goes_on, f"it does not go on:\n{started.output}"
            time.sleep(0.05)
        (fault,) = draw.choices(list(FAULTS), list(FAULTS.values()))
        happened[fault.__name__] += 1
        if fault(started, run, draw):
            if started.process.poll() is None:
                started.end(120)
            return False
