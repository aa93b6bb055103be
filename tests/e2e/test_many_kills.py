"""Workers die again and again, at steps drawn from a seed: each step is trained as if none had died."""

import os
import random
import signal

import pytest

from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.test_resume import TWO_WORKERS, wait_for_step
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(1800)]

SAVE_STEPS = 3
LONG = {
    **TWO_WORKERS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "eval_steps": 40,
    "learning_rate": 1e-3,
    "completion_prompts": [],
}


@pytest.mark.parametrize("num_kills", [4, 20])
def test_many_kills_in_one_run_change_nothing(world: World, num_kills: int) -> None:
    """With the default of 3 for ray.max_failures: there is a checkpoint between each two."""
    settings = {**LONG, "max_steps": 6 * num_kills}
    wanted = world.finished(f"unkilled-{num_kills}", **settings)
    draw = random.Random(7)
    name = f"killed-{num_kills}-times"
    run, started = world.run_dir(name), world.train(name, **settings)
    step, pids = 0, []
    for _ in range(num_kills):
        step += draw.randint(SAVE_STEPS + 1, SAVE_STEPS + 2)
        assert step < settings["max_steps"]
        wait_for_step(started, run, step)
        workers = [pid for pid, title in started.tree().items() if title.startswith("ray::RayTrainWorker")]
        pids.append(draw.choice(sorted(workers)))
        os.kill(pids[-1], signal.SIGKILL)
    assert started.end() == 0, started.output
    told = [line for line in started.output.splitlines() if "starting again from step-" in line]
    assert len(told) == num_kills, started.output
    assert all(f"pid {pid}, in phase " in line for pid, line in zip(pids, told, strict=True)), told
    assert "Traceback" not in started.output and not started.errors
    assert started.leaves_nothing_behind(), started.tree()
    assert_same_course(run, wanted)
    assert_same_adapter(run, wanted)
