"""What the data page shows, as one JSON-ready dict: statistics, mix, settings and examples. See page.py."""

import json
from collections.abc import Sequence
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.data.examples import Probe
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.mix import epoch_mix
from nemo_ray.data.prepare import dataset_specs
from nemo_ray.data.statistics import data_statistics, sum_of

PAGE_EXAMPLES = 3
"""Of each dataset, where the user does not say how many."""

_PAGE_TOKENS = 8_000
"""Of all examples together: each is some 30 bytes of the page."""


def page_facts(plan: DataPlan, config: Config, probes: Sequence[Probe]) -> dict[str, Any]:
    """`statistics` are of the shards that exist; where none does, each source's are its first rows'."""
    statistics = data_statistics(plan)
    probed = not statistics["train"]["prepared_windows"]
    if probed:
        for probe in probes:
            totals = sum_of([probe.stats]).to_json(plan.sequence_len)
            statistics["sources"][probe.source]["train"] = totals
        together = sum_of(probe.stats for probe in probes).to_json(plan.sequence_len)
        statistics["train"] |= {**together, "prepared_windows": 0}
        statistics["rejected_examples"] = _rejected(probes)
    shown = [(probe.source, example) for probe in probes for example in probe.examples]
    room = max(40, _PAGE_TOKENS // max(1, sum(not example.rejected for _, example in shown)))
    return {
        "title": config.output_dir,
        "directory": plan.directory,
        "fingerprint": plan.fingerprint,
        "probed_rows": sum(probe.stats.rows for probe in probes) if probed else None,
        "labels": _labels([source.name for source in plan.sources]),
        "statistics": statistics,
        "mix": epoch_mix(plan, config.seed),
        "settings": _settings(config),
        "notices": list(plan.notices),
        "examples": [{"source": source, **example.shortened(room).to_json()} for source, example in shown],
    }


def _labels(names: Sequence[str]) -> list[str]:
    """Short names of the datasets: the last part of their paths, where that tells them apart."""
    short = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _rejected(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    return [
        {"file": example.file, "row": example.row, "reason": example.rejected, "detail": ""}
        for probe in probes
        for example in probe.examples
        if example.rejected
    ]


def _settings(config: Config) -> list[list[str]]:
    """(key, value) of all that shapes the data."""
    values = config.data.model_dump(mode="json", exclude={"datasets", "test_datasets"})
    values = {"base_model": config.base_model, "seed": config.seed, **values}
    rows = [[name, _shown(value)] for name, value in values.items() if value not in (None, {}, [])]
    names = [f"datasets[{number}]" for number in range(len(config.datasets))]
    names += [f"test_datasets[{number}]" for number in range(len(config.test_datasets))]
    specs = dataset_specs(config.data)
    entries = [_shown(spec.model_dump(mode="json", exclude_defaults=True)) for spec in specs]
    return rows + [[name, entry] for name, entry in zip(names, entries, strict=True)]


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
