"""Sweeps are checked whole before anything starts: the section, the space, and each trial's configuration."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray.errors import ConfigError
from nemo_ray.tune.load import Sweep, load_sweep
from nemo_ray.tune.shards import parse_shard
from nemo_ray.tune.sweep_dir import trial_name

PARAMETERS = {"lora_r": [4, 8], "lora_alpha": "2 * lora_r", "learning_rate": {"loguniform": [1e-4, 1e-2]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "rows.jsonl").write_text("")
    return tmp_path


def load(folder: Path, tune: Any, *overrides: str, **changes: Any) -> Sweep:
    keys = {
        "base_model": str(folder / "base"),
        "datasets": [{"path": str(folder / "rows.jsonl")}],
        "adapter": "lora",
        "lora_target_modules": ["q_proj"],
        "output_dir": str(folder / "sweep"),
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**keys, **({"tune": tune} if tune is not None else {})}, sort_keys=False))
    return load_sweep(str(path), overrides)


def test_each_trial_has_its_own_configuration(folder: Path) -> None:
    found = load(folder, {"parameters": PARAMETERS, "num_trials": 5, "seed": 3})
    assert [trial.number for trial in found.trials] == list(range(5))
    for trial in found.trials:
        config = trial.config
        assert config.output_dir == str(folder / "sweep" / "trials" / trial_name(trial.number))
        assert config.lora_r == trial.point["lora_r"] and config.lora_alpha == 2 * config.lora_r
        assert config.learning_rate == trial.point["learning_rate"]
        rest = {"output_dir", *PARAMETERS}
        assert config.model_dump(exclude=rest) == found.base.config.model_dump(exclude=rest)
    assert len({trial.config.learning_rate for trial in found.trials}) == 5


def test_a_grid_and_overrides(folder: Path) -> None:
    tune = {"parameters": {"lora_r": [4, 8], "micro_batch_size": [1, 2]}, "search": "grid"}
    points = [trial.point for trial in load(folder, tune).trials]
    assert points == [{"lora_r": r, "micro_batch_size": m} for r in (4, 8) for m in (1, 2)]
    found = load(folder, tune, "tune.parameters.lora_r=[16]", "tune.search=random", "learning_rate=1e-3")
    assert {trial.config.lora_r for trial in found.trials} == {16} and len(found.trials) == 2
    assert found.trials[0].config.learning_rate == 1e-3


def test_sets_of_targets_and_axolotls_spellings(folder: Path) -> None:
    tune = {"parameters": {"lora_target_modules": [["q_proj"], ["q_proj", "v_proj"]]}, "search": "grid"}
    assert [trial.config.lora_target_modules for trial in load(folder, tune).trials] == [
        ("q_proj",),
        ("q_proj", "v_proj"),
    ]


@pytest.mark.parametrize(
    ("tune", "lines"),
    [
        (None, ["tune: missing; give a section with parameters"]),
        (3, ["tune: 3 is not valid; give a section with parameters"]),
        ({}, ["tune.parameters: missing; give a map from a key"]),
        ({"parameters": {}}, ["tune.parameters: {} is not valid; give a map from a key"]),
        (
            {"parameters": {"lora_r": [4]}, "trials": 3},
            ["tune.trials: 3: unknown key; did you mean tune.num_trials?"],
        ),
        (
            {"parameters": {"lora_r": [4]}, "num_trials": 0, "scheduler": "best"},
            [
                "tune.num_trials: 0 is not valid; give a whole",
                "tune.scheduler: best is not valid; give none, asha, hyperband, median or pbt",
            ],
        ),
        (
            {"parameters": {"lora_rr": [4], "seed": [1], "sequence_len": [64], "learning_rate": "x +"}},
            [
                "tune.parameters.lora_rr: unknown key; did you mean lora_r?",
                "tune.parameters.seed: cannot differ between trials: all trials see the same sample order",
                "tune.parameters.sequence_len: cannot differ between trials: they share the base model",
                "tune.parameters.learning_rate: is no formula; give a list",
            ],
        ),
        (
            {"parameters": PARAMETERS, "search": "grid"},
            ["tune.parameters.learning_rate: a grid is made of lists; give a list, or tune.search: random"],
        ),
        (
            {"parameters": {"lora_r": [1, 2, 3]}, "search": "grid", "num_trials": 2},
            ["tune.num_trials: 2 trials do not cover the grid, which has 3 points; set it to that"],
        ),
        (
            {"parameters": {"lora_r": [1, 2, 3]}, "num_trials": 4},
            ["tune.num_trials: 4, but the space has 3 points; set it to that"],
        ),
        (
            {"parameters": {"lora_r": [4]}, "max_cost": 10},
            ["tune.max_cost: needs a price; give tune.price_per_gpu_hour"],
        ),
        (
            {"parameters": {"lora_r": [8, -1]}, "search": "grid"},
            ["trial 1 (lora_r=-1): lora_r: -1 is not valid; give a whole number above 0"],
        ),
        (
            {"parameters": {"lora_alpha": "2 * rank"}, "search": "grid"},
            ["tune.parameters.lora_alpha: 2 * rank names rank, which is no key"],
        ),
        (
            {"parameters": PARAMETERS, "scheduler": "pbt"},
            [
                "tune.parameters.lora_r: pbt gives a trial other values while it trains, and this one cannot "
                "change then; sweep learning_rate, lr_scheduler"
            ],
        ),
        (
            {"parameters": {"learning_rate": [1e-3, 1e-2]}, "scheduler": "pbt", "search": "optuna"},
            ["tune.search: pbt finds values itself, from random ones; set tune.search: random"],
        ),
        (
            {"parameters": {"learning_rate": [1e-3]}, "scheduler": "pbt"},
            ["tune.num_trials: pbt compares trials with each other; set it to 2 or more"],
        ),
        (
            {"parameters": {"learning_rate": [1e-3, 1e-2]}, "scheduler": "pbt"},
            ["eval_steps: pbt compares trials at their evaluations; set it"],
        ),
        (
            {"parameters": {"learning_rate": [1e-3, 1e-2]}, "perturbation_interval": 2},
            ["tune.perturbation_interval: it belongs to tune.scheduler: pbt; set that, or remove it"],
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(folder: Path, tune: Any, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(folder, tune)
    found = str(refused.value).splitlines()
    assert len(found) == len(lines), found
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start), line


def test_a_population_that_would_never_change_is_refused(folder: Path) -> None:
    tune = {"parameters": {"learning_rate": [1e-3, 1e-2]}, "scheduler": "pbt", "perturbation_interval": 3}
    with pytest.raises(ConfigError, match="^tune.perturbation_interval: 3, but with eval_steps: 4 "):
        load(folder, tune, eval_steps=4, max_steps=12)
    found = load(folder, tune, eval_steps=4, max_steps=13)
    with pytest.raises(ConfigError, match="^--shard: 1/2 of 2 trials has one, and pbt compares trials"):
        parse_shard("1/2", found)
    assert parse_shard("1/1", found).count == 1
    without = load(folder, {**tune, "perturbation_interval": None}, eval_steps=4)
    assert without.section.perturbation_interval == 1


@pytest.mark.parametrize("key", ["early_stopping_patience", "load_best_model_at_end"])
def test_a_population_is_judged_by_its_last_evaluation(folder: Path, key: str) -> None:
    tune = {"parameters": {"learning_rate": [1e-3, 1e-2]}, "scheduler": "pbt"}
    others = {"eval_steps": 2, "save_steps": 2, "val_set_size": 0.1}
    with pytest.raises(ConfigError, match=f"^{key}: with pbt a trial is what its last evaluation says"):
        load(folder, tune, **others, **{key: 1 if key == "early_stopping_patience" else True})


@pytest.mark.parametrize("key", ["wandb_run_id", "mlflow_parent_run_id"])
def test_trials_do_not_share_a_run_in_a_tracker(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: each trial of a sweep has a run of its own"):
        load(folder, {"parameters": {"lora_r": [4]}}, **{key: "abc"})
