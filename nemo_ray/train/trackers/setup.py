"""What the driver checks and passes on before a run that uses trackers. Imports none of them."""

from collections.abc import Mapping
from importlib.util import find_spec

from nemo_ray.config.schema import TrackingSection
from nemo_ray.errors import ConfigError

_PREFIXES = {"wandb": ("WANDB_",), "mlflow": ("MLFLOW_", "DATABRICKS_")}
_URI_VARIABLE = "MLFLOW_TRACKING_URI"


def _used(tracking: TrackingSection) -> dict[str, str]:
    """Package -> the key that asks for it."""
    used = {}
    if tracking.sends_to_wandb:
        used["wandb"] = f"wandb_project: {tracking.wandb_project}"
    if tracking.sends_to_mlflow:
        name = tracking.mlflow_experiment_name
        used["mlflow"] = "use_mlflow: true" if name is None else f"mlflow_experiment_name: {name}"
    return used


def check_trackers(tracking: TrackingSection, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where a tracker is configured that cannot be reached from any worker."""
    for package, asked in _used(tracking).items():
        if find_spec(package) is None:
            raise ConfigError(
                f"{asked} needs the package {package}, which is not installed here; run "
                f"`pip install 'nemo-ray[{package}]'`, or remove the key"
            )
    if tracking.sends_to_mlflow and tracking.mlflow_tracking_uri is None and _URI_VARIABLE not in environ:
        raise ConfigError(
            f"{_used(tracking)['mlflow']} needs a server; give mlflow_tracking_uri, or set {_URI_VARIABLE}"
        )


def variables_to_pass_on(tracking: TrackingSection, environ: Mapping[str, str]) -> dict[str, str]:
    """The trackers' variables (servers, keys) for workers on other nodes; none for trackers not used."""
    prefixes = tuple(prefix for package in _used(tracking) for prefix in _PREFIXES[package])
    return {name: value for name, value in environ.items() if name.startswith(prefixes)} if prefixes else {}
