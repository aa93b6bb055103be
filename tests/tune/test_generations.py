"""A population over run directories: the same course whoever is faster, and after a kill at any moment."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.run_dir import RunDir
from nemo_ray.tune import sweep_dir
from nemo_ray.tune.course import Course
from nemo_ray.tune.generations import Generations
from nemo_ray.tune.load import Sweep, Trial, load_sweep
from nemo_ray.tune.source import Begun
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import Population, SweepDir
from nemo_ray.tune.trial import FAILED, FINISHED, STOPPED, Teller

TRIALS, EVALUATIONS, STEPS = 8, 6, 10
BEST_RATE = 1e-3


class Killed(BaseException):
    """The machine dies."""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load(tmp_path)


def load(tmp_path: Path, **section: Any) -> Sweep:
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "rows.jsonl").touch()
    rates = {"learning_rate": {"loguniform": [1e-5, 1e-1]}, "weight_decay": [0.0, 0.1]}
    tune = {"parameters": rates, "scheduler": "pbt", "num_trials": TRIALS, "seed": 5, **section}
    return load_sweep(
        {
            "base_model": str(tmp_path / "base"),
            "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
            "adapter": "lora",
            "lora_target_modules": ["q_proj"],
            "output_dir": str(tmp_path / "out"),
            "eval_steps": STEPS,
            "tune": tune,
        }
    )


class Play:
    """A sweep with trials in this process, whose weights are a number in a file."""

    def __init__(
        self, sweep: Sweep, path: Path, at_once: int = 3, fails: int = -1, refused: int = -1
    ) -> None:
        self.sweep, self.folder, self.at_once = sweep, SweepDir(path), at_once
        self.fails, self.refused, self.dies_before_the_end = fails, refused, False
        self.said: list[str] = []
        self.course = Course(self.folder, range(sweep.num_trials), "eval_loss", "min", "pbt")
        self.course.restore()
        begun = self.folder.points([trial.point for trial in sweep.trials])
        self.points: dict[int, Point] = {n: point for n, point in enumerate(begun) if point is not None}
        self.source = Generations(sweep, self.course, self.points, self.finish, self.said.append)

    def finish(self, trial: Trial) -> Config:
        if trial.number == self.refused and self.folder.read_population().generations:
            raise ConfigError("does not fit\nat all")
        return trial.config

    def run(self, draw: random.Random, most: int = 999) -> Population:
        """Trials that train in a drawn order; after `most` of their parts it is over."""
        running: list[Begun] = []
        while most:
            while len(running) < self.at_once and not self.course.closed:
                try:
                    found = self.source.next()
                except StopIteration:
                    break
                if found is None:
                    break
                running.append(found)
            if not running:
                break
            self.train(running.pop(draw.randrange(len(running))))
            most -= 1
        return self.folder.read_population()

    def train(self, begun: Begun) -> None:
        """From the newest checkpoint to the pause or the end, as workers do it."""
        run = self.course.run(begun.number)
        assert begun.config.learning_rate == self.points[begun.number]["learning_rate"]
        checkpoint = run.newest_checkpoint()
        step, weight = 0, 1.0 + begun.number / 100
        if checkpoint is not None:
            step = int(checkpoint.name.removeprefix("step-"))
            weight = float((checkpoint / "weight").read_text())
        if begun.number == self.fails and step == 2 * STEPS:
            self.course.ended(begun.number, FAILED, "broken")
            return
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_run({})
        run.truncate_metrics(step)
        while step < EVALUATIONS * STEPS and step < (begun.pause_after or 99) * STEPS:
            step += STEPS
            weight *= 1.0 - min(begun.config.learning_rate, BEST_RATE**2 / begun.config.learning_rate) * 100
            run.append_metrics({"step": step, "eval_loss": weight, "rate": begun.config.learning_rate})
        run.flush_metrics()
        save(run, step, weight)
        for evaluation in Teller(run, "eval_loss").new():
            self.course.evaluated(begun.number, evaluation)
        if self.dies_before_the_end and step == EVALUATIONS * STEPS:
            raise Killed
        status = FINISHED if step == EVALUATIONS * STEPS else STOPPED
        run.update_run({"outcome": status})
        self.course.ended(begun.number, status, "")


def save(run: RunDir, step: int, weight: float) -> None:
    """As with save_total_limit: 1."""
    folder = run.checkpoint_dir(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weight").write_text(repr(weight))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    for older in run.checkpoint_steps()[:-1]:
        run.remove_checkpoint(older)


def curves(folder: SweepDir) -> list[list[tuple[int, float, float]]]:
    return [
        [(row["step"], row["eval_loss"], row["rate"]) for row in folder.trial(number).read_metrics()]
        for number in range(TRIALS)
    ]


def test_trials_go_on_from_better_ones(sweep: Sweep, tmp_path: Path) -> None:
    play = Play(sweep, tmp_path / "whole")
    population = play.run(random.Random(0))
    assert population.generations == EVALUATIONS - 1, "at its end nothing is changed"
    assert {end.status for end in play.course.ends.values()} == {FINISHED} and not play.course.left()
    rows = curves(play.folder)
    for change in population.changes:
        index = change.evaluation - 1
        own, better = rows[change.number][index], rows[change.source][index]
        assert change.step == own[0] == better[0] and better[1] < own[1]
        rate = rows[change.number][index + 1][2]
        assert rate == change.point["learning_rate"], "trained with the new values from there on"
        gained = 1.0 - min(rate, BEST_RATE**2 / rate) * 100
        assert rows[change.number][index + 1][1] == pytest.approx(better[1] * gained), "from its weights"
    assert len(population.changes) == len(play.said) == 2 * population.generations
    assert "goes on from trial" in play.said[0] and "learning_rate=" in play.said[0]
    assert play.course.best() is not None


def test_it_does_not_depend_on_who_is_faster_or_how_many_run(sweep: Sweep, tmp_path: Path) -> None:
    found = []
    for at_once in (1, 3, TRIALS):
        play = Play(sweep, tmp_path / str(at_once), at_once)
        found.append((play.run(random.Random(at_once)), curves(play.folder)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("most", [1, 5, 8, 13, 16, 30])
def test_killed_and_resumed_it_is_the_same(sweep: Sweep, tmp_path: Path, most: int) -> None:
    whole = Play(sweep, tmp_path / "whole")
    wanted = whole.run(random.Random(0)), curves(whole.folder)
    Play(sweep, tmp_path / "killed").run(random.Random(1), most)
    again = Play(sweep, tmp_path / "killed")
    assert (again.run(random.Random(2)), curves(again.folder)) == wanted


@pytest.mark.parametrize("moment", ["copy", "rename", "after rename", "note"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_between_generations_it_is_the_same(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, count: int
) -> None:
    whole = Play(sweep, tmp_path / "whole")
    wanted = whole.run(random.Random(0)), curves(whole.folder)
    left = [count]

    def dies(real: Any, before: bool) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and before:
                raise Killed
            result = real(*given, **named)
            if left[0] == 0:
                raise Killed
            return result

        return call

    with monkeypatch.context() as broken:
        if moment == "copy":
            broken.setattr(sweep_dir.shutil, "copytree", dies(sweep_dir.shutil.copytree, False))
        elif moment == "note":
            broken.setattr(SweepDir, "write_population", dies(SweepDir.write_population, True))
        else:
            publish = dies(sweep_dir.publish_folder, moment == "rename")
            broken.setattr(sweep_dir, "publish_folder", publish)
        with pytest.raises(Killed):
            Play(sweep, tmp_path / "killed").run(random.Random(1))
    again = Play(sweep, tmp_path / "killed")
    assert (again.run(random.Random(2)), curves(again.folder)) == wanted


def test_a_checkpoint_that_a_kill_took_away_is_trained_again(sweep: Sweep, tmp_path: Path) -> None:
    whole = Play(sweep, tmp_path / "whole")
    wanted = whole.run(random.Random(0)), curves(whole.folder)
    killed = Play(sweep, tmp_path / "killed")
    killed.run(random.Random(1), most=5)
    for number in range(TRIALS):  # evaluated, and killed before it had saved
        for step in killed.course.run(number).checkpoint_steps():
            killed.course.run(number).remove_checkpoint(step)
    again = Play(sweep, tmp_path / "killed")
    assert (again.run(random.Random(2)), curves(again.folder)) == wanted


def test_every_second_evaluation(tmp_path: Path) -> None:
    play = Play(load(tmp_path, perturbation_interval=2), tmp_path / "sweep")
    population = play.run(random.Random(0))
    assert population.generations == 2 and {one.evaluation for one in population.changes} == {2, 4}


def test_a_trial_that_fails_leaves_the_population(sweep: Sweep, tmp_path: Path) -> None:
    play = Play(sweep, tmp_path / "sweep", fails=4)
    population = play.run(random.Random(0))
    later = [one for one in population.changes if one.evaluation > 2]
    assert later and all(4 not in (one.number, one.source) for one in later)
    assert play.course.ends[4].status == FAILED
    assert sum(end.status == FINISHED for end in play.course.ends.values()) == TRIALS - 1


def test_a_trial_whose_values_do_not_fit_fails(sweep: Sweep, tmp_path: Path) -> None:
    play = Play(sweep, tmp_path / "sweep", refused=2)
    play.run(random.Random(0))
    assert play.course.ends[2].status == FAILED and play.course.ends[2].reason == "does not fit; at all"
    assert len(play.course.ends) == TRIALS


def test_trials_that_somebody_stopped_wait_for_a_resume(sweep: Sweep, tmp_path: Path) -> None:
    play = Play(sweep, tmp_path / "sweep")
    for _ in range(3):
        begun = play.source.next()
        assert begun is not None
        play.course.ended(begun.number, STOPPED, "")  # before it was there
    while (begun := next_or_none(play.source)) is not None:
        play.train(begun)
    assert play.folder.read_population().generations == 0 and len(play.course.left()) == TRIALS
    again = Play(sweep, tmp_path / "sweep")
    assert again.run(random.Random(0)).generations == EVALUATIONS - 1


def next_or_none(source: Generations) -> Begun | None:
    try:
        return source.next()
    except StopIteration:
        return None


@pytest.mark.parametrize("finished", [0, 3, TRIALS - 2])
def test_trials_that_are_killed_at_their_end_do_not_take_over_each_other(
    sweep: Sweep, tmp_path: Path, finished: int
) -> None:
    """Their last checkpoint is there, and the machine dies before they have said that they are finished."""
    whole = Play(sweep, tmp_path / "whole")
    wanted = whole.run(random.Random(0)), curves(whole.folder)
    killed = Play(sweep, tmp_path / "killed")
    killed.run(random.Random(1), most=TRIALS * (EVALUATIONS - 1) + finished)
    killed = Play(sweep, tmp_path / "killed", at_once=1)
    killed.dies_before_the_end = True
    for _ in range(TRIALS - finished):
        with pytest.raises(Killed):
            killed.run(random.Random(2), most=1)
        killed.course.running.clear()
    again = Play(sweep, tmp_path / "killed")
    assert (again.run(random.Random(3)), curves(again.folder)) == wanted
    assert len(again.course.ends) == TRIALS


def test_a_sweep_that_is_to_end_begins_nothing(sweep: Sweep, tmp_path: Path) -> None:
    play = Play(sweep, tmp_path / "sweep")
    play.run(random.Random(0), most=TRIALS)  # all are there
    play.course.close("over")
    assert next_or_none(play.source) is None and play.folder.read_population().generations == 0


def test_rows_that_are_gone_since_the_start_end_no_trial(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    play = Play(sweep, tmp_path / "sweep")
    play.run(random.Random(0))
    assert {end.status for end in play.course.ends.values()} == {FINISHED}
