"""From a YAML file with a `tune` section to the checked configuration of every trial.

Owns what may be swept, and that nothing starts before all of it is known to be right.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

from pydantic import ValidationError

from nemo_ray.config.load import LoadedConfig, check_raw, problem_lines, read_raw
from nemo_ray.config.nearest import nearest
from nemo_ray.config.ranges import Range, parse_parameter
from nemo_ray.config.schema import AdapterSection, Config, TrainSection
from nemo_ray.config.translate import canonical_key, drop_absent, show
from nemo_ray.config.tune_schema import TuneSection
from nemo_ray.errors import ConfigError
from nemo_ray.storage import join
from nemo_ray.tune.population import CHANGEABLE
from nemo_ray.tune.space import Point, Space, ends, grid, random, size
from nemo_ray.tune.sweep_dir import TRIALS_NAME, trial_name

DEFAULT_TRIALS = 10
_ONE_FOR_ALL = {
    "output_dir": "each trial has a folder in it",
    "overwrite": "it is about the whole sweep",
    "resume_from_checkpoint": "it is about the whole sweep",
    "seed": "all trials see the same sample order",
    "lora_model_dir": "all trials start from the same weights",
}
"""Keys that no trial has for itself, and why."""
SWEPT = frozenset({**AdapterSection.model_fields, **TrainSection.model_fields}) - _ONE_FOR_ALL.keys()


@dataclass(frozen=True)
class Trial:
    """One of a sweep's runs."""

    number: int
    point: Point
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    section: TuneSection
    base: LoadedConfig
    """What all trials share."""
    trials: tuple[Trial, ...]
    """Those that are known before the first one begins: all, unless the search learns from results."""
    num_trials: int
    space: Space
    fixed: Mapping[str, Any]
    """Keys that formulas may name."""
    make: Callable[[int, Point, bool], Trial]
    """The trial of a number and a point; whether to look at its paths. Raises ConfigError."""
    probes: tuple[Trial, ...] = ()
    """Trials at the ends of the space, checked where trials have points that are not known yet."""


def load_sweep(
    source: str | Mapping[str, Any], overrides: Sequence[str] = (), *, check_paths: bool = True
) -> Sweep:
    """Read and check a sweep and the configuration of every trial.

    source: path of a YAML file, or its content. check_paths: as in load_config. Raises ConfigError, a line a
    problem.
    """
    raw = read_raw(source, overrides)
    section = _section(raw.pop("tune", None))
    space = _space(section)
    base = check_raw(copy.deepcopy(raw), check_paths=check_paths)
    for key in ("wandb_run_id", "mlflow_parent_run_id"):
        if getattr(base.config, key) is not None:
            raise ConfigError(f"{key}: each trial of a sweep has a run of its own, in a group; remove it")
    fixed = base.config.to_dict()

    def make(number: int, point: Point, look: bool = check_paths) -> Trial:
        output_dir = join(base.config.output_dir, TRIALS_NAME, trial_name(number))
        own = {**copy.deepcopy(raw), **copy.deepcopy(point), "output_dir": output_dir}
        try:
            return Trial(number, point, check_raw(own, check_paths=look).config)
        except ConfigError as error:
            values = ", ".join(f"{name}={show(value)}" for name, value in point.items())
            lines = (f"trial {number} ({values}): {line}" for line in str(error).splitlines())
            raise ConfigError("\n".join(lines)) from None

    num_trials = _num_trials(section, space)
    if section.scheduler == "pbt":
        _check_population(section, base.config, num_trials)
    trials: tuple[Trial, ...] = ()
    probes: tuple[Trial, ...] = ()
    try:
        if section.search == "optuna" or section.scheduler == "pbt":
            probes = tuple(make(0, point) for point in ends(space, fixed))
        if section.search != "optuna":
            points = grid(space, fixed) if section.search == "grid" else random(space, fixed, section.seed)
            trials = tuple(make(n, point) for n, point in enumerate(islice(points, num_trials)))
    except ValueError as error:
        raise ConfigError(f"tune.parameters.{error}") from None
    return Sweep(section, base, trials, num_trials, space, fixed, make, probes)


def _section(raw: Any) -> TuneSection:
    if not isinstance(raw, dict):
        what = "missing" if raw is None else f"{show(raw)} is not valid"
        raise ConfigError(f"tune: {what}; give a section with parameters, such as lora_r: [8, 16, 32]")
    raw = drop_absent(raw)
    if isinstance(raw.get("parameters"), dict):
        raw["parameters"] = {canonical_key(str(key)): value for key, value in raw["parameters"].items()}
    try:
        section = TuneSection.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(error, TuneSection, "tune"))) from None
    if section.max_cost is not None and section.price_per_gpu_hour is None:
        raise ConfigError("tune.max_cost: needs a price; give tune.price_per_gpu_hour")
    if section.search == "optuna" and find_spec("optuna") is None:
        raise ConfigError(
            "tune.search: optuna needs the package optuna, which is not installed here; run "
            "`pip install 'nemo-ray[optuna]'`, or set tune.search: random"
        )
    if section.scheduler == "pbt":
        return section.model_copy(update={"perturbation_interval": section.perturbation_interval or 1})
    if section.perturbation_interval is not None:
        raise ConfigError(
            "tune.perturbation_interval: it belongs to tune.scheduler: pbt; set that, or remove it"
        )
    return section


def _check_population(section: TuneSection, base: Config, num_trials: int) -> None:
    """Raises ConfigError where a value cannot change while a trial trains, or nothing would change it."""
    fixed = [name for name in section.parameters if name not in CHANGEABLE]
    if fixed:
        raise ConfigError(
            f"tune.parameters.{fixed[0]}: pbt gives a trial other values while it trains, and this one "
            f"cannot change then; sweep {', '.join(CHANGEABLE)}, or set tune.scheduler: asha"
        )
    if section.search == "optuna":
        raise ConfigError("tune.search: pbt finds values itself, from random ones; set tune.search: random")
    if num_trials < 2:
        raise ConfigError("tune.num_trials: pbt compares trials with each other; set it to 2 or more")
    rhythm = base.eval_steps or base.evals_per_epoch
    if not rhythm:
        raise ConfigError("eval_steps: pbt compares trials at their evaluations; set it")
    interval = section.perturbation_interval or 1
    if base.eval_steps and base.max_steps and interval * base.eval_steps >= base.max_steps:
        raise ConfigError(
            f"tune.perturbation_interval: {show(interval)}, but with eval_steps: {show(base.eval_steps)} the "
            f"trials end at max_steps: {show(base.max_steps)} before any value changes; evaluate more often"
        )
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(base, name):
            raise ConfigError(f"{name}: with pbt a trial is what its last evaluation says; remove it")


def _space(section: TuneSection) -> Space:
    space, errors = {}, []
    for name, value in section.parameters.items():
        try:
            problem = _not_swept(name)
            if problem is not None:
                raise ValueError(problem)
            space[name] = parse_parameter(value)
        except ValueError as error:
            errors.append(f"tune.parameters.{name}: {error}")
            continue
        if section.search == "grid" and isinstance(space[name], Range):
            errors.append(
                f"tune.parameters.{name}: a grid is made of lists; give a list, or tune.search: random"
            )
    if errors:
        raise ConfigError("\n".join(errors))
    return space


def _not_swept(name: str) -> str | None:
    """Why a key cannot be swept; None where it can."""
    if name in SWEPT:
        return None
    if name in _ONE_FOR_ALL:
        return f"cannot differ between trials: {_ONE_FOR_ALL[name]}"
    if name in Config.model_fields:
        return "cannot differ between trials: they share the base model, the data and the cluster"
    best = nearest((name,))
    return "unknown key" + (f"; did you mean {best}?" if best else "; docs/config.md lists the keys")


def _num_trials(section: TuneSection, space: Space) -> int:
    points, asked = size(space), section.num_trials
    if section.search == "grid":
        if asked is not None and asked < points:
            raise ConfigError(
                f"tune.num_trials: {asked} trials do not cover the grid, which has {points:g} points; "
                "set it to that, take values out, or set tune.search: random"
            )
        return int(points)
    if asked is not None and asked > points:
        raise ConfigError(f"tune.num_trials: {asked}, but the space has {points:g} points; set it to that")
    return asked or (DEFAULT_TRIALS if math.isinf(points) else min(DEFAULT_TRIALS, int(points)))
