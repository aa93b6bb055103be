"""Parts of a sweep, trained on several clusters, made one: its trials, its report, its best.

Reads result directories wherever they are, and writes a new one; checkpoints stay where they are.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ray.config.translate import show
from nemo_ray.errors import ConfigError
from nemo_ray.storage import absolute, join, list_files, publish_bytes, read_bytes, read_json
from nemo_ray.tune.course import best_of
from nemo_ray.tune.report import write_report
from nemo_ray.tune.shards import Shard
from nemo_ray.tune.sweep_dir import (
    POPULATION_NAME,
    SWEEP_NAME,
    TRIAL_NAME,
    TRIALS_NAME,
    Population,
    SweepDir,
    TrialEnd,
    population_of,
    trial_name,
)

_ALIKE = ("trials", "data_fingerprint")
"""What sweep.json must say alike for trials to be compared."""
_ALIKE_OF_TUNE = ("metric", "mode")
_OF_A_CLUSTER = ("output_dir", "dataset_prepared_path", "datasets", "test_datasets", "base_model", "ray")
_OF_A_CLUSTER += ("chat_template", "lora_model_dir", "mlflow_tracking_uri")
"""Keys that say where things are: what the data is, template included, is compared by its fingerprint."""
_COPIED = ("metrics.jsonl", "run.json", TRIAL_NAME)
_RESULTS = ("adapter", "model")


@dataclass(frozen=True)
class Part:
    """One result directory."""

    place: str
    facts: Mapping[str, Any]

    @property
    def numbers(self) -> range:
        """Its trials."""
        return Shard.of(self.facts).numbers(len(self.facts["trials"]))

    def trial(self, number: int) -> str:
        """The place of a trial's run directory."""
        return join(self.place, TRIALS_NAME, trial_name(number))


def merge(places: Sequence[str], output_dir: str | Path) -> SweepDir:
    """Join the sweeps in `places` (folders or URLs) in `output_dir`, in place of an earlier merge's.

    Raises: ConfigError where they are no parts of one sweep, or hold the same trial, or `output_dir` holds
    anything else; OSError.
    """
    parts = [_read(place) for place in places]
    for part in parts[1:]:
        _check_alike(parts[0], part)
    owners = _owners(parts)
    folder = SweepDir(output_dir)
    if folder.holds_sweep() and "parts" in folder.read():
        folder.clear()
    if folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(f"--output: {folder.path} is not empty; name another folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write({"parts": []})  # a merge that is broken off can be begun again
    ends = {number: end for number, part in owners.items() if (end := _copy(part, number, folder))}
    facts = _facts(parts, owners, ends)
    folder.write(facts)
    _join_populations(parts, folder)
    best = facts["best"]
    if best is not None:
        _fetch_result(owners[best], best, folder)
        point = folder.points(facts["trials"])[best] or {}
        own = {**facts["config"], **point, "output_dir": f"{folder.path}-best"}
        folder.publish_best(best, {name: value for name, value in own.items() if value is not None})
    write_report(folder)
    return folder


def _read(place: str) -> Part:
    place = place.rstrip("/")
    try:
        return Part(absolute(place), read_json(join(place, SWEEP_NAME)))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{place}: there is no sweep; name the output_dir of one") from None
    except ValueError as error:
        raise ConfigError(f"{join(place, SWEEP_NAME)} is damaged: {error}") from None


def _check_alike(first: Part, other: Part) -> None:
    """Raises ConfigError where trials of the two cannot be compared."""
    names = [name for name in _ALIKE if first.facts[name] != other.facts[name]]
    names += [f"tune.{k}" for k in _ALIKE_OF_TUNE if first.facts["tune"][k] != other.facts["tune"][k]]
    if not names:
        one, two = first.facts["config"], other.facts["config"]
        keys = sorted({*one, *two} - set(_OF_A_CLUSTER))
        names = [
            f"{key} ({show(one.get(key))} and {show(two.get(key))})"
            for key in keys
            if one.get(key) != two.get(key)
        ]
    if names:
        raise ConfigError(
            f"{other.place} and {first.place} are no parts of one sweep: they differ in {', '.join(names)}"
        )


def _owners(parts: Sequence[Part]) -> dict[int, Part]:
    """Which part has a trial, by its number, in order. Raises ConfigError where two have it."""
    found: dict[int, Part] = {}
    for part in parts:
        for number in part.numbers:
            if number in found:
                raise ConfigError(
                    f"{part.place} and {found[number].place} both have trial {number}; name each part once"
                )
            found[number] = part
    return dict(sorted(found.items()))


def _copy(part: Part, number: int, folder: SweepDir) -> TrialEnd | None:
    """The small files of a trial; returns how it ended, None where it has not."""
    run = folder.trial(number)
    for name in _COPIED:
        try:
            data = read_bytes(join(part.trial(number), name))
        except FileNotFoundError:
            continue
        run.path.mkdir(parents=True, exist_ok=True)
        publish_bytes(run.path / name, data)
    return folder.read_end(number)


def _join_populations(parts: Sequence[Part], folder: SweepDir) -> None:
    """What happened in each part under `pbt`: trials are compared with those of their own part."""
    found = []
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            found.append(population_of(read_json(join(part.place, POPULATION_NAME))))
    if found:
        changes = tuple(change for one in found for change in one.changes)
        folder.write_population(Population(max(one.generations for one in found), changes))


def _fetch_result(part: Part, number: int, folder: SweepDir) -> None:
    """The adapter or the model of a trial, as it was trained."""
    source = part.trial(number)
    for name in _RESULTS:
        for file in list_files(join(source, name)):
            target = folder.trial(number).path / file.removeprefix(f"{source}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            publish_bytes(target, read_bytes(file))


def _facts(parts: Sequence[Part], owners: Mapping[int, Part], ends: Mapping[int, TrialEnd]) -> dict[str, Any]:
    """sweep.json of the whole. Clusters train beside each other: its time is that of the longest part."""
    first, num_trials = parts[0].facts, len(parts[0].facts["trials"])
    facts = {name: value for name, value in first.items() if name not in ("shard", "why", "mlflow_run_id")}
    for name in ("trial_seconds", "trial_gpus"):
        own = {n: part.facts[name][n] for n, part in owners.items() if name in part.facts}
        facts[name] = [own.get(number, 0.0) for number in range(num_trials)]
    left = num_trials - len(ends)
    return {
        **facts,
        "best": best_of(ends.values(), first["tune"]["mode"]),
        "outcome": "stopped" if left else "finished",
        "elapsed_s": max(part.facts.get("elapsed_s", 0.0) for part in parts),
        "parts": [{"place": part.place, "shard": str(Shard.of(part.facts))} for part in parts],
    }
