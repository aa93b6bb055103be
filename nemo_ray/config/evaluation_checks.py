"""Rules between the keys that choose and stop by an evaluation, and between those of the trackers.

Each function returns one line per problem, with key, value, rule and remedy; it raises nothing.
"""

from collections.abc import Iterator

from nemo_ray.config.schema import Config
from nemo_ray.urls import redact

_WANDB_KEYS = ("wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode")
_MLFLOW_KEYS = ("mlflow_tracking_uri", "mlflow_run_name")


def evaluation_rules(config: Config) -> Iterator[str]:
    """What cannot be chosen or stopped by."""
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        value = getattr(config, key)
        if not value:
            continue
        text = f"{key}: {str(value).lower()}"
        if not config.val_set_size and not config.test_datasets:
            yield f"{text} needs held-out rows to go by; give val_set_size or test_datasets"
        elif config.eval_steps is None and config.evals_per_epoch is None:
            yield f"{text} needs evaluations before the end; give eval_steps or evals_per_epoch"
    if config.greater_is_better:
        yield (
            "greater_is_better: true would choose the worst checkpoint, since "
            f"{config.metric_for_best_model} is a loss; remove it"
        )


def evaluation_notices(config: Config) -> Iterator[str]:
    """Keys that do nothing in this combination."""
    given = config.model_fields_set
    if "early_stopping_threshold" in given and config.early_stopping_patience is None:
        yield "early_stopping_threshold: not used without early_stopping_patience"
    chooses = config.load_best_model_at_end or config.early_stopping_patience is not None
    if "metric_for_best_model" in given and not chooses:
        yield "metric_for_best_model: not used without load_best_model_at_end or early_stopping_patience"


def tracker_rules(config: Config) -> Iterator[str]:
    """What a tracker lacks."""
    if config.use_wandb and config.wandb_project is None:
        yield "use_wandb: true needs a project; give wandb_project"
    uri = config.mlflow_tracking_uri
    if uri is not None and redact(uri) != uri:
        yield (
            f"mlflow_tracking_uri: {redact(uri)} holds credentials, which would be written to run.json; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )


def tracker_notices(config: Config) -> Iterator[str]:
    """Keys of a tracker that gets nothing, although nobody switched it off."""
    settled = config.sends_to_wandb or config.use_wandb is False or config.wandb_mode == "disabled"
    unused = [key for key in _WANDB_KEYS if getattr(config, key) is not None]
    if unused and not settled:
        yield f"{', '.join(unused)}: not used, since W&B gets nothing without wandb_project"
    unused = [key for key in _MLFLOW_KEYS if getattr(config, key) is not None]
    if unused and not config.sends_to_mlflow and config.use_mlflow is None:
        yield (
            f"{', '.join(unused)}: not used, since MLflow gets nothing without mlflow_experiment_name or "
            "use_mlflow: true"
        )
