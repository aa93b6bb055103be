"""One window to one shard: read, template, tokenize, mask, pack, write. Knows no Ray.

A pure function of the window's rows and the settings below: where and when it runs changes nothing.
"""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.encode import Encoder, Sample
from nemo_ray.data.files import read_span
from nemo_ray.data.formats import format_of
from nemo_ray.data.formats.base import resolve
from nemo_ray.data.histograms import shard_histograms
from nemo_ray.data.manifest import DataPlan, FileFormat
from nemo_ray.data.packing import pack
from nemo_ray.data.shards import ShardStats, write_shard
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import TokenizerSpec, load_tokenizer
from nemo_ray.data.window_list import Span, Window
from nemo_ray.object_store import expect_answers

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
    """The entries that a plan's sources stand for, in their order, with what holds for all of them."""
    return tuple(resolve(spec, data) for spec in (*data.datasets, *data.test_datasets))


def window_task(
    plan: DataPlan, window: Window, data: DataSection, base_model: str, *, held_out: bool
) -> WindowTask:
    """The task of one of the plan's `windows`, or `eval_windows` (`held_out`)."""
    files = plan.sources[window.source].files
    spec = dataset_specs(data)[window.source]
    eval_packing = data.sample_packing if data.eval_sample_packing is None else data.eval_sample_packing
    return WindowTask(
        path=plan.shard_path(window),
        spans=tuple((files[span.file].path, files[span.file].format, span) for span in window.spans),
        spec=spec,
        tokenizer=TokenizerSpec.of(data, base_model).for_dataset(spec),
        sequence_len=data.sequence_len,
        packing=eval_packing if held_out else data.sample_packing,
        truncate=data.excess_length_strategy == "truncate",
        train_on_inputs=data.train_on_inputs,
    )


def prepare_window(task: WindowTask) -> ShardStats:
    """Write the window's shard and return its statistics. Raises DataError or ConfigError."""
    for path in (task.path, *(path for path, _, _ in task.spans)):  # the driver has planned them
        expect_answers(path)
    # Rows and samples are a great many containers, none of them in a cycle: looking for cycles takes 6%.
    collecting = gc.isenabled()
    gc.disable()
    try:
        results = encode_rows(read_rows(task), task.spec, task.tokenizer, task.train_on_inputs)
        packed = pack_rows(results, task)
        write_shard(task.path, packed.samples, packed.rows, packed.packs, packed.stats)
        return packed.stats
    finally:
        if collecting:
            gc.enable()


class PackedRows(NamedTuple):
    """What a shard is made of, see `write_shard`."""

    samples: list[Sample]
    rows: list[int]
    packs: list[list[int]]
    stats: ShardStats


def pack_rows(results: Sequence[list[Sample] | RowError], task: WindowTask) -> PackedRows:
    """Samples of consecutive rows, dropped, cut and packed as the task says, and what became of them."""
    splits = format_of(task.spec).splits
    samples: list[Sample] = []
    rows: list[int] = []
    rejected: list[tuple[int, str, str]] = []
    whole: list[int] = []
    dropped = truncated = 0
    for row, result in enumerate(results):
        if isinstance(result, RowError):
            rejected.append((row, result.reason, result.detail[:200]))
            continue
        for sample in result:
            whole.append(len(sample.ids))
            fitted = fit(sample, task.sequence_len, splits, task.truncate)
            dropped += not fitted
            truncated += len(fitted) == 1 and len(fitted[0].ids) < len(sample.ids)
            samples += fitted
            rows += [row] * len(fitted)
    lengths = [len(sample.ids) for sample in samples]
    packs = pack(lengths, task.sequence_len) if task.packing else [[index] for index in range(len(samples))]
    targets = [int(np.count_nonzero(sample.targets[1:])) for sample in samples]
    documents = list(zip(lengths, targets, strict=True))
    stats = ShardStats(
        rows=len(results),
        documents=len(samples),
        packs=len(packs),
        tokens=sum(lengths),
        targets=sum(targets),
        dropped=dropped,
        truncated=truncated,
        rejected=dict(sorted(Counter(reason for _, reason, _ in rejected).items())),
        rejected_rows=tuple(rejected[:LISTED_REJECTIONS]),
        histograms=shard_histograms(whole, documents, packs, task.sequence_len),
    )
    return PackedRows(samples, rows, packs, stats)


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


def fit(sample: Sample, sequence_len: int, splits: bool, truncate: bool) -> list[Sample]:
    """The documents that a sample becomes: itself, its parts, its beginning, or none.

    Parts (`splits`) begin with the last token of the part before, so that each token has its predecessor.
    """
    size = len(sample.ids)
    if size <= sequence_len:
        return [sample]
    starts = range(0, size - 1, max(sequence_len - 1, 1)) if splits else range(1 if truncate else 0)
    windows = [slice(start, start + sequence_len) for start in starts]
    parts = [Sample(sample.ids[window], sample.targets[window]) for window in windows]
    return [part for part in parts if part.targets[1:].any()]


def row_columns(spec: DatasetSpec) -> list[str]:
    """Fields of a row that matter."""
    return format_of(spec).columns(spec)


def encode_rows(
    rows: list[Any], spec: DatasetSpec, tokenizer: TokenizerSpec, train_on_inputs: bool
) -> list[list[Sample] | RowError]:
    """For each row its samples, or the reason why there is none."""
    return _encoder(spec.model_dump_json(), tokenizer, train_on_inputs).encode(rows)


@lru_cache(maxsize=16)
def _encoder(spec: str, tokenizer: TokenizerSpec, train_on_inputs: bool) -> Encoder:
    """One a process and source: its cache of header ids outlives the window."""
    loaded, entry = load_tokenizer(tokenizer), DatasetSpec.model_validate_json(spec)
    return Encoder(loaded, format_of(entry).reader(entry, loaded, train_on_inputs))
