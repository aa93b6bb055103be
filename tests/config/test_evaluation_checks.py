"""Keys that choose and stop by an evaluation, and keys of trackers: what goes together, and what is used."""

from typing import Any

import pytest

from tests.config.helpers import Keys, errors_of, load

EVALUATED = {"val_set_size": 0.1, "eval_steps": 5}


@pytest.mark.parametrize("key", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_choosing_and_stopping_need_evaluations(world: Keys, key: Keys) -> None:
    assert errors_of(world | EVALUATED | key) == []
    assert errors_of(world | {"val_set_size": 0.1, "evals_per_epoch": 2} | key) == []
    (name,) = key
    for missing, remedy in (("val_set_size", "test_datasets"), ("eval_steps", "evals_per_epoch")):
        keys = world | {k: v for k, v in EVALUATED.items() if k != missing} | key
        (line,) = errors_of(keys)
        assert line.startswith(f"{name}: ") and missing in line and remedy in line


@pytest.mark.parametrize(
    ("value", "means"),
    [("loss", "eval_loss"), ("eval_loss", "eval_loss"), ("loss/chats", "eval_loss/chats")],
)
def test_the_metric_by_transformers_short_name(world: Keys, value: str, means: str) -> None:
    keys = EVALUATED | {"load_best_model_at_end": True, "metric_for_best_model": value}
    loaded = load(world | keys)
    assert loaded.config.metric_for_best_model == means and loaded.notices == ()


def test_a_loss_is_never_better_where_it_is_greater(world: Keys) -> None:
    (line,) = errors_of(world | EVALUATED | {"load_best_model_at_end": True, "greater_is_better": True})
    assert line.startswith("greater_is_better: true ")


@pytest.mark.parametrize(
    ("keys", "wandb", "mlflow"),
    [
        ({}, False, False),
        ({"wandb_project": "a"}, True, False),
        ({"wandb_project": "a", "use_wandb": False, "wandb_name": "b"}, False, False),
        ({"wandb_project": "a", "wandb_mode": "disabled"}, False, False),
        ({"mlflow_experiment_name": "a", "mlflow_run_name": "b"}, False, True),
        ({"use_mlflow": True}, False, True),
        ({"use_mlflow": False, "mlflow_experiment_name": "a", "mlflow_run_name": "b"}, False, False),
    ],
)
def test_which_trackers_get_figures(world: Keys, keys: dict[str, Any], wandb: bool, mlflow: bool) -> None:
    loaded = load(world | keys)
    tracking = loaded.config.tracking
    assert (tracking.sends_to_wandb, tracking.sends_to_mlflow) == (wandb, mlflow)
    assert loaded.notices == ()
