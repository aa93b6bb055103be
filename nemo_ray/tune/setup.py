"""Before a sweep begins: whether it may use its folder, what its trials run with, how many at a time."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.errors import ConfigError, NemoRayError
from nemo_ray.targets import expert_paths, find_targets, linear_paths
from nemo_ray.train import outputs, resources
from nemo_ray.tune.groups import trial_keys
from nemo_ray.tune.load import Sweep, Trial
from nemo_ray.tune.shards import Shard
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import SweepDir, trial_name
from nemo_ray.tune.trial import DRIVER_CPUS

_SHARED = ("base_model", "revision_of_model", "chat_template", "lora_model_dir", "mlflow_tracking_uri")
_SHARED += ("dataset_prepared_path", "datasets", "test_datasets")
_RECORDED = ("config", "versions", "git_revision", "data_fingerprint", "submission_id", "started_at")


_SAME = ("parameters", "search", "seed", "metric", "mode")
"""Keys of the tune section that decide which points are found while it runs."""
_SAME_OF_PBT = ("scheduler", "perturbation_interval")


def points(sweep: Sweep, known: Mapping[int, Point]) -> list[Point | None]:
    """What each trial tries, in the order of their numbers; None where that is not known yet."""
    found = {**{trial.number: trial.point for trial in sweep.trials}, **known}
    return [dict(found[number]) if number in found else None for number in range(sweep.num_trials)]


def check_free(folder: SweepDir, overwrite: bool) -> None:
    """Raises ConfigError where a new sweep would replace what is not to be replaced."""
    if folder.holds_sweep():
        if not overwrite:
            raise ConfigError(
                f"output_dir: {folder.place} already holds a sweep; continue it with --resume, replace it "
                "with overwrite=true, or name another output_dir"
            )
        return
    foreign = folder.foreign_entries()
    if foreign:
        raise ConfigError(
            f"output_dir: {folder.place} is not the folder of a sweep (it holds {', '.join(foreign[:3])}); "
            "name another output_dir"
        )


def read_earlier(folder: SweepDir, sweep: Sweep, shard: Shard) -> dict[str, Any]:
    """sweep.json of the sweep to continue. Raises ConfigError where there is none, or another one."""
    if not folder.holds_sweep():
        raise ConfigError(f"output_dir: {folder.place} holds no sweep to resume; leave out --resume")
    earlier = folder.read()
    section = sweep.section.model_dump(mode="json")
    same = (
        earlier["trials"] == points(sweep, {}) if sweep.trials else len(earlier["trials"]) == sweep.num_trials
    )
    keys = () if sweep.trials else _SAME
    begun = earlier.get("tune", {})
    if "pbt" in (begun.get("scheduler"), section["scheduler"]):
        keys = (*_SAME, *_SAME_OF_PBT)
    if not same or any(begun.get(name) != section[name] for name in keys):
        raise ConfigError(
            f"output_dir: the sweep in {folder.place} has other trials than this configuration makes; "
            "restore its tune section, or name another output_dir"
        )
    if Shard.of(earlier) != shard:
        raise ConfigError(
            f"--shard: {folder.place} holds part {Shard.of(earlier)} of the sweep, not {shard}; give that one"
        )
    return earlier


def check_data(folder: SweepDir, earlier: Mapping[str, Any], plan: DataPlan) -> None:
    """Raises ConfigError where the data changed since the sweep began."""
    if earlier["data_fingerprint"] != plan.fingerprint:
        raise ConfigError(
            f"output_dir: the data of the sweep in {folder.place} changed since it began; restore its files "
            "and data keys, or name another output_dir"
        )


def trial_config(trial: Trial, shared: Config, folder: SweepDir) -> Config:
    """As for an ordinary run that may have begun, in the sweep's folder, with what all trials share."""
    update: dict[str, Any] = {name: getattr(shared, name) for name in _SHARED}
    update |= {"resume_from_checkpoint": "auto", "overwrite": False}
    update["output_dir"] = folder.trial_place(trial.number)
    update |= trial_keys(shared.tracking, folder.name, trial_name(trial.number))
    return trial.config.model_copy(update=update)


def check_targets(number: int, config: Config, shape: Mapping[str, Any]) -> None:
    """Raises ConfigError where a trial's LoRA names match nothing in the model."""
    if config.adapter:
        try:
            find_targets(config.adapter_config, linear_paths(shape), expert_paths(shape))
        except ConfigError as error:
            raise ConfigError(f"trial {number}: {error}") from None


def facts(sweep: Sweep, shard: Shard, config: Config, plan: DataPlan, job_id: str | None) -> dict[str, Any]:
    """What sweep.json says when a sweep begins."""
    run = outputs.run_facts(config, plan, 0, job_id)
    section = sweep.section.model_dump(mode="json")
    own = {"tune": section, "trials": points(sweep, {}), "shard": [shard.number, shard.count]}
    return {**{name: run[name] for name in _RECORDED}, **own}


def most_at_once(
    wanted: resources.Demand, nodes: Sequence[Mapping[str, float]], accelerator_type: str | None, most: int
) -> int:
    """How many trials fit on the cluster beside each other, up to `most`; 1 at least.

    A trial's own process takes DRIVER_CPUS more than its workers, which Tune does not count.
    """
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    for count in range(most, 1, -1):
        together = replace(wanted, num_workers=count * wanted.num_workers, at_least=None)
        if together.worker_cpus + count * DRIVER_CPUS > total_cpus:
            continue
        with contextlib.suppress(NemoRayError):
            resources.place(together, nodes, accelerator_type)
            return count
    return 1
