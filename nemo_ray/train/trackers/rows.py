"""What trackers are sent: the figures of a row under the names that they show, and facts without secrets."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan

Row = Mapping[str, Any]
_NOT_FIGURES = ("step", "data_hash")
_USER_IN_URL = re.compile(r"(\w://)[^/\s]*@")
_QUERY_OF_URL = re.compile(r"(\w://[^\s?]*)\?\S*")


def figures(row: Row) -> dict[str, float]:
    """A row of metrics.jsonl as flat figures: train/loss; eval/loss, and eval_loss/DATASET.

    No name is the beginning of another, at a slash: MLflow's store of files could not hold them.
    """
    if "eval_loss" not in row:
        own = {f"train/{name}": value for name, value in row.items() if name not in _NOT_FIGURES}
        return {name: value for name, value in own.items() if value is not None}
    found = {name.replace("_", "/", 1): row[name] for name in ("eval_loss", "eval_tokens", "eval_s")}
    for dataset, own in row["eval_datasets"].items():
        found |= {f"eval_{name}/{dataset}": value for name, value in own.items() if value is not None}
    return found


def facts(config: Config, plan: DataPlan) -> dict[str, Any]:
    """The configuration, and what the data is; nothing that opens a door."""
    data = {
        "fingerprint": plan.fingerprint,
        "rows": plan.num_rows,
        "held_out_rows": sum(window.num_rows for window in plan.eval_windows),
        "estimated_tokens": round(plan.estimated_tokens(plan.windows)),
        "sources": [
            {
                "name": source.name,
                "rows": source.num_rows,
                "held_out_rows": source.held_out_rows,
                "tokens_per_row": round(source.tokens_per_row, 1),
            }
            for source in plan.sources
        ],
    }
    found: dict[str, Any] = without_secrets({"config": config.to_dict(), "data": data})
    return found


def without_secrets(value: Any) -> Any:
    """The same value; URLs in it lose user, password and query, where keys and signatures are."""
    if isinstance(value, str):
        return _QUERY_OF_URL.sub(r"\1", _USER_IN_URL.sub(r"\1", value))
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts; None is left out."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{name}.")
        elif isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
            yield from flat({str(index): entry for index, entry in enumerate(item)}, f"{prefix}{name}.")
        elif item is not None:
            yield f"{prefix}{name}", str(item)
