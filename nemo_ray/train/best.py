"""Which evaluation is the best so far, when to stop for want of a better one, and which checkpoints stay.

Pure rules over evaluation rows of metrics.jsonl. A continued run counts the rows that it finds there again,
so it knows what the uninterrupted one would know. The meaning of the keys is transformers': an evaluation
before the first step is not counted. Computing and writing rows is evaluation.py's and loop.py's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.errors import ConfigError, DataError

EVAL_LOSS = "eval_loss"
_SUFFIXES = re.compile(r"(\.(jsonl?|ndjson|parquet|csv|tsv|arrow|txt|gz|zst|bz2))+(?= |$)")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


def eval_names(plan: DataPlan) -> dict[int, str]:
    """A name for each source that has held-out rows, by its index in plan.sources.

    It is the last part of the path, without a file's suffix and with the split, in letters that every
    tracker takes; the second one of a name gets -2, in the order of the configuration.
    """
    names: dict[int, str] = {}
    for source in sorted({window.source for window in plan.eval_windows}):
        parts = [_short(part) for part in plan.sources[source].name.split("/")]
        stem = next((part for part in reversed(parts) if part), "data")
        name, number = stem, 1
        while name in names.values():
            number += 1
            name = f"{stem}-{number}"
        names[source] = name
    return names


def _short(part: str) -> str:
    return _NOT_IN_NAMES.sub("-", _SUFFIXES.sub("", part)).strip("-.")


def check_metric(train: TrainSection, plan: DataPlan) -> None:
    """Raises ConfigError where metric_for_best_model names a dataset that is not evaluated."""
    known = [EVAL_LOSS, *(f"{EVAL_LOSS}/{name}" for name in eval_names(plan).values())]
    if plan.eval_windows and train.metric_for_best_model not in known:
        raise ConfigError(
            f"metric_for_best_model: {train.metric_for_best_model} is not evaluated here; give one of "
            f"{', '.join(known)}"
        )


def metric_of(row: Mapping[str, Any], metric: str) -> float:
    """The loss that `metric` names, in an evaluation row.

    Raises: DataError where the dataset has no target token.
    """
    if metric == EVAL_LOSS:
        return float(row[EVAL_LOSS])
    loss = row["eval_datasets"][metric.removeprefix(f"{EVAL_LOSS}/")]["loss"]
    if loss is None:
        raise DataError(f"metric_for_best_model: {metric} has no value: none of the rows has a target token")
    return float(loss)


class Best:
    """The best evaluation so far. Feed it every evaluation, in order."""

    def __init__(self, train: TrainSection) -> None:
        self.metric = train.metric_for_best_model
        self._patience, self._threshold = train.early_stopping_patience, train.early_stopping_threshold
        self.step: int | None = None
        self.value = math.inf
        self.misses = 0
        """Evaluations in a row that were not better by more than early_stopping_threshold."""

    def add(self, row: Mapping[str, Any]) -> bool:
        """Count an evaluation row; returns whether it is the best so far. NaN never is."""
        if row["step"] == 0:
            return False
        value = metric_of(row, self.metric)
        better = value < self.value
        self.misses = 0 if better and self.value - value > self._threshold else self.misses + 1
        if better:
            self.step, self.value = row["step"], value
        return better

    @property
    def patience_is_over(self) -> bool:
        """Whether so many evaluations brought nothing that training should stop."""
        return self._patience is not None and self.misses >= self._patience

    def facts(self) -> dict[str, Any] | None:
        """For run.json; None where no evaluation was counted."""
        return None if self.step is None else {"metric": self.metric, "value": self.value, "step": self.step}


def best_of(rows: Sequence[Mapping[str, Any]], train: TrainSection, last_step: int) -> Best:
    """The best among the evaluations in `rows` of metrics.jsonl up to `last_step`."""
    best = Best(train)
    for row in rows:
        if EVAL_LOSS in row and row["step"] <= last_step:
            best.add(row)
    return best


def steps_to_delete(steps: Sequence[int], keep: int, best: int | None) -> list[int]:
    """Of checkpoints at `steps`, ascending, the oldest beyond `keep`, but never the best or the newest.

    As in transformers, two are kept where `keep` is 1 and the best is not the newest.
    """
    free = [step for step in steps if step not in (best, steps[-1])]
    return free[: max(0, len(steps) - keep)]
