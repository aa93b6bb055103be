"""A population by the real command: killed and resumed, the worst goes on from the best."""

from pathlib import Path

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.tune.sweep_dir import SweepDir
from nemo_ray.tune.trial import FINISHED
from tests.e2e.command import TUNE, Command
from tests.e2e.compare import assert_each_step_once, eval_rows, train_rows
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]

RATES = [1e-2, 1e-6, 5e-3]
STEPS, EVERY = 6, 3


def begin(world: World, folder: SweepDir, *arguments: str) -> Command:
    section = {"parameters": {"learning_rate": RATES}, "search": "grid", "scheduler": "pbt"}
    keys = {"max_steps": STEPS, "eval_steps": EVERY, "save_total_limit": 1, "completion_prompts": []}
    config = world.write_yaml(output_dir=str(folder.path), tune=section, **keys)
    return world.command(*TUNE, str(config), *arguments)


def test_killed_and_resumed_the_worst_goes_on_from_the_best(world: World) -> None:
    folder = SweepDir(world.run_dir("population").path)
    started = begin(world, folder)
    started.wait_until(folder.population_file.exists, 600)
    started.kill_tree()
    population = folder.read_population()
    (change,) = population.changes
    at_pause = {number: eval_rows(folder.trial(number))[-1]["eval_loss"] for number in range(3)}
    assert population.generations == 1 and change.number == 1 and change.step == EVERY
    assert at_pause[change.source] == min(at_pause.values()) and at_pause[1] == max(at_pause.values())
    again = begin(world, folder, "--resume")
    assert again.end(600) == 0, again.output
    assert "Traceback" not in again.output and not again.errors, again.output
    assert again.leaves_nothing_behind(), again.tree()
    assert folder.read_population() == population, "what was decided stays"
    ends = [folder.read_end(number) for number in range(3)]
    assert [end is not None and (end.status, end.step) for end in ends] == [(FINISHED, STEPS)] * 3
    for number in range(3):
        assert_each_step_once(folder.trial(number), STEPS, [0, EVERY, STEPS])
    losses = {number: eval_rows(folder.trial(number))[-1]["eval_loss"] for number in range(3)}
    assert losses[1] < at_pause[change.source], "a rate that learns nothing did not get there alone"
    rates = [row["lr"] for row in train_rows(folder.trial(1))]
    assert max(rates[:EVERY]) < 1e-5 < max(rates[EVERY:])
    best = load_config(str(Path(folder.best_dir) / "config.yaml")).config
    assert (
        best.learning_rate == folder.points(folder.read()["trials"])[folder.read()["best"]]["learning_rate"]
    )
    assert "1; 1 time a trial went on from another" in again.output
    assert "Generations" in folder.report_file.read_text()
