"""The commands from Python: `from nemo_ray.api import plan, prepare, sweep, train`.

Each takes the path of a YAML file, or its content as a mapping, and "key=value" as on the command line; runs
in this process's main thread, prints what the command prints, and returns what came of it. A configuration
that is refused raises ConfigError, before torch or Ray are loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ray.config.load import LoadedConfig, check_raw, read_raw
from nemo_ray.session import require_none
from nemo_ray.tune import SweepResult, TrialResult, merge, read_result, sweep

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "PlanResult",
    "PreparedData",
    "SweepResult",
    "TrainResult",
    "TrialResult",
    "merge",
    "plan",
    "prepare",
    "read_result",
    "sweep",
    "train",
]
Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """A run that came to its end."""

    output_dir: str
    """A folder, or the URL of one in an object store; checkpoints, metrics and reports lie in it."""
    result: str
    """The adapter's folder or URL, or the model's where every weight was trained."""
    step: int
    """The last one; `exported_step` is whose weights `result` has."""
    exported_step: int
    eval_loss: float | None
    """The last held-out loss; None where no rows are held out."""
    metrics: tuple[Mapping[str, Any], ...]
    """The rows of metrics.jsonl: those of steps have a loss, those of evaluations an eval_loss."""

    @property
    def dataframe(self) -> "DataFrame":
        """`metrics` as a table."""
        from pandas import DataFrame

        return DataFrame(list(self.metrics))


@dataclass(frozen=True)
class PreparedData:
    """Data that is ready to be trained on."""

    directory: str
    """Its shards' folder or URL; the same data is found there again by later runs."""
    documents: int
    tokens: int
    target_tokens: int
    packs: int
    efficiency: float | None
    """Share of positions that hold a token, 0 to 1; None without packs."""
    rejected: int
    """Rows that cannot be used."""
    facts: Mapping[str, Any]
    """All that the command's page is made from: by part and by data set."""


@dataclass(frozen=True)
class PlanResult:
    """What a run takes."""

    facts: Mapping[str, Any]
    """What `nemo-ray plan --json` prints."""

    @property
    def fits(self) -> bool:
        """Whether each GPU can hold its part."""
        return bool(self.facts["memory"]["fits"])

    @property
    def peak_bytes(self) -> float:
        """Of a GPU's memory."""
        return float(self.facts["memory"]["peak"])

    @cached_property
    def memory_bytes(self) -> Mapping[str, float]:
        """By class: weights, adapters, activations and so on; not all of it is there at the peak."""
        return dict(self.facts["memory"]["classes"])

    @property
    def tokens_per_s(self) -> float | None:
        """Of all GPUs; None where it does not fit."""
        found: float | None = self.facts["speed"]["tokens_per_s"]
        return found

    @property
    def seconds(self) -> float | None:
        """Of the whole run; of 100 M tokens where the data cannot be looked at."""
        found: float | None = self.facts["data"]["seconds"]
        return found

    @property
    def cost(self) -> float | None:
        """The same in the price's currency; None without one."""
        found: float | None = self.facts["data"]["cost"]
        return found

    @property
    def recommended(self) -> Mapping[str, Any] | None:
        """The option that the command would mark: name, keys to set, peak, speed. None where none fits."""
        return next((option for option in self.facts["options"] if option["recommended"]), None)


def train(config: Source, *overrides: str, force: bool = False, verbose: bool = False) -> TrainResult:
    """Train, or resume, as `python -m nemo_ray.train` does.

    Args:
        force: although no GPU of the cluster can hold it, by the estimate.
        verbose: print what Ray and the workers log.

    Raises: NemoRayError, or what a worker raised, where it failed; KeyboardInterrupt where it was stopped.
    """
    loaded = _load(config, overrides)
    require_none()
    from nemo_ray.train.interrupts import EXIT_CODE as INTERRUPTED
    from nemo_ray.train.launch import Launch, Parts

    launch = Launch(loaded, Parts(), force, verbose)
    code = launch.run()
    if launch.error is not None:
        raise launch.error
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    run = launch.run_dir
    facts, metrics = run.read_run(), tuple(run.read_metrics())
    evaluations = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    return TrainResult(
        output_dir=run.place,
        result=run.shown(run.adapter_dir if launch.config.adapter else run.model_dir),
        step=max((row["step"] for row in metrics), default=0),
        exported_step=facts["exported_step"],
        eval_loss=evaluations[-1] if evaluations else None,
        metrics=metrics,
    )


def prepare(config: Source, *overrides: str) -> PreparedData:
    """Tokenize and pack all of a configuration's data, as `python -m nemo_ray.data` does.

    Raises: DataError where rows cannot be used, KeyboardInterrupt where it was stopped.
    """
    loaded = _load(config, overrides)
    require_none()
    from rich.console import Console

    from nemo_ray.data.ahead import plan_ahead, prepare_ahead
    from nemo_ray.data.preparing import Interrupts
    from nemo_ray.data.statistics import data_statistics

    console = Console(highlight=False)
    with Interrupts() as interrupts:
        found, pinned = plan_ahead(loaded, console)
        prepare_ahead(found, pinned, console, interrupts)
    facts = data_statistics(found)
    part = facts["train"]
    return PreparedData(
        directory=found.directory,
        documents=part["documents"],
        tokens=part["tokens"],
        target_tokens=part["targets"],
        packs=part["packs"],
        efficiency=part["efficiency"],
        rejected=sum(part["rejected"].values()),
        facts=facts,
    )


def plan(
    config: Source,
    *overrides: str,
    gpu: str = "h100",
    num_gpus: int | None = None,
    price: float | None = None,
) -> PlanResult:
    """Say what a run takes of which GPUs, as `nemo-ray plan` does. Prints nothing, and needs no GPU.

    Args:
        gpu: its name, as the command's help has them.
        num_gpus: None for ray.num_workers, else 1.
        price: of a GPU hour.
    """
    loaded = _load(config, overrides, check_paths=False)
    from nemo_ray.plan.facts import plan_facts

    return PlanResult(plan_facts(loaded.config, gpu, num_gpus, price))


def _load(config: Source, overrides: tuple[str, ...], check_paths: bool = True) -> LoadedConfig:
    source = config if isinstance(config, Mapping) else str(config)
    return check_raw(read_raw(source, overrides), check_paths=check_paths)
