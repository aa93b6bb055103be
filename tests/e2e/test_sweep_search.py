"""A sweep whose search learns from results: killed and resumed, it tries the same points."""

from typing import Any

import pytest

from nemo_ray.tune.sweep_dir import SweepDir
from tests.e2e.command import TUNE, Command
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(1500)]

NUM_TRIALS = 5
SECTION = {
    "parameters": {"learning_rate": {"loguniform": [1.0e-4, 3.0e-2]}, "lora_r": [2, 4, 8]},
    "search": "optuna",
    "scheduler": "median",
    "num_trials": NUM_TRIALS,
    "max_concurrent": 2,
    "seed": 4,
}


def begin(world: World, name: str, *arguments: str) -> tuple[Command, SweepDir]:
    folder = SweepDir(world.run_dir(name).path)
    config = world.write_yaml(output_dir=str(folder.path), tune=SECTION, lora_alpha=16)
    return world.command(*TUNE, str(config), *arguments), folder


def results(folder: SweepDir) -> list[Any]:
    ends = [folder.read_end(number) for number in range(NUM_TRIALS)]
    return [
        (end.status, end.evaluation, pytest.approx(end.value, rel=1e-5)) for end in ends if end is not None
    ]


def test_killed_and_resumed_it_tries_the_same_points(world: World) -> None:
    whole, folder = begin(world, "search-whole")
    assert whole.end(900) == 0, whole.output
    points = folder.read()["trials"]
    assert len({str(point) for point in points}) == NUM_TRIALS
    for number, point in enumerate(points):
        config = folder.trial(number).read_run()["config"]
        assert {name: config[name] for name in point} == point
    killed, found = begin(world, "search-killed")
    killed.wait_until(lambda: any(found.read_end(number) for number in (0, 1)), 600)
    killed.kill_tree()
    assert None in [found.read_end(number) for number in range(NUM_TRIALS)]
    again, _ = begin(world, "search-killed", "--resume")
    assert again.end(900) == 0, again.output
    assert "Traceback" not in again.output and not again.errors, again.output
    assert found.read()["trials"] == points and found.read()["best"] == folder.read()["best"]
    assert results(found) == results(folder) and len(results(folder)) == NUM_TRIALS
