"""One window to one shard: read, template, tokenize, mask, pack, write. Knows no Ray.

A pure function of the window's rows and the settings below: where and when it runs changes nothing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.encode import Encoder, Sample
from nemo_ray.data.files import read_span
from nemo_ray.data.manifest import DataPlan, FileFormat, Span, Window
from nemo_ray.data.packing import pack
from nemo_ray.data.shards import ShardStats, write_shard
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import TokenizerSpec, load_tokenizer

LISTED_REJECTIONS = 1000
"""Rejected rows that a shard lists; all are counted."""


@dataclass(frozen=True)
class WindowTask:
    """All that preparing one window needs; small and picklable."""

    path: str
    spans: tuple[tuple[str, FileFormat, Span], ...]
    spec: DatasetSpec
    tokenizer: TokenizerSpec
    sequence_len: int
    packing: bool
    truncate: bool
    train_on_inputs: bool


def dataset_specs(data: DataSection) -> tuple[DatasetSpec, ...]:
    """The entries that a plan's sources stand for, in their order."""
    return (*data.datasets, *data.test_datasets)


def window_task(
    plan: DataPlan, window: Window, data: DataSection, base_model: str, *, held_out: bool
) -> WindowTask:
    """The task of one of the plan's `windows`, or `eval_windows` (`held_out`)."""
    files = plan.sources[window.source].files
    eval_packing = data.sample_packing if data.eval_sample_packing is None else data.eval_sample_packing
    return WindowTask(
        path=plan.shard_path(window),
        spans=tuple((files[span.file].path, files[span.file].format, span) for span in window.spans),
        spec=dataset_specs(data)[window.source],
        tokenizer=TokenizerSpec.of(data, base_model),
        sequence_len=data.sequence_len,
        packing=eval_packing if held_out else data.sample_packing,
        truncate=data.excess_length_strategy == "truncate",
        train_on_inputs=data.train_on_inputs,
    )


def prepare_window(task: WindowTask) -> ShardStats:
    """Write the window's shard and return its statistics. Raises DataError or ConfigError."""
    results = encode_rows(read_rows(task), task.spec, task.tokenizer, task.train_on_inputs)
    samples: list[Sample] = []
    rows: list[int] = []
    rejected: list[tuple[int, str, str]] = []
    dropped = truncated = 0
    for row, result in enumerate(results):
        if isinstance(result, RowError):
            rejected.append((row, result.reason, result.detail[:200]))
            continue
        if len(result.ids) > task.sequence_len:
            result = Sample(result.ids[: task.sequence_len], result.targets[: task.sequence_len])
            if not (task.truncate and result.targets[1:].any()):
                dropped += 1
                continue
            truncated += 1
        samples.append(result)
        rows.append(row)
    lengths = [len(sample.ids) for sample in samples]
    packs = pack(lengths, task.sequence_len) if task.packing else [[index] for index in range(len(samples))]
    stats = ShardStats(
        rows=len(results),
        documents=len(samples),
        packs=len(packs),
        tokens=sum(lengths),
        targets=sum(int(np.count_nonzero(sample.targets[1:])) for sample in samples),
        dropped=dropped,
        truncated=truncated,
        rejected=dict(sorted(Counter(reason for _, reason, _ in rejected).items())),
        rejected_rows=tuple(rejected[:LISTED_REJECTIONS]),
    )
    write_shard(task.path, samples, rows, packs, stats)
    return stats


def repairer(plan: DataPlan, data: DataSection, base_model: str) -> Callable[[Window], None]:
    """What prepares a window of the plan again, in this process: for readers that find its shard damaged."""
    held_out = {window.key for window in plan.eval_windows}

    def repair(window: Window) -> None:
        prepare_window(window_task(plan, window, data, base_model, held_out=window.key in held_out))

    return repair


def read_rows(task: WindowTask) -> list[Any]:
    """The window's rows in order."""
    columns = row_columns(task.spec)
    return [row for path, form, span in task.spans for row in read_span(path, form, span, columns)]


def row_columns(spec: DatasetSpec) -> list[str]:
    """Fields of a row that matter."""
    return [spec.field] if spec.type == "completion" else [spec.field_messages, "tools"]


def encode_rows(
    rows: list[Any], spec: DatasetSpec, tokenizer: TokenizerSpec, train_on_inputs: bool
) -> list[Sample | RowError]:
    """A sample, or the reason why there is none, for each row."""
    return _encoder(spec.model_dump_json(), tokenizer, train_on_inputs).encode(rows)


@lru_cache(maxsize=16)
def _encoder(spec: str, tokenizer: TokenizerSpec, train_on_inputs: bool) -> Encoder:
    """One a process and source: its cache of header ids outlives the window."""
    return Encoder(load_tokenizer(tokenizer), DatasetSpec.model_validate_json(spec), train_on_inputs)
