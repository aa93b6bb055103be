"""Files to windows: which rows are prepared together, and which are held out. Nothing is tokenized but a
probe.

A window is a block of consecutive rows of one file, worth about 256 packs; small files share one. Held-out
rows are runs of 16 consecutive rows chosen by a hash of file name and run number, so neither the seed nor
another file's growth moves them:

    rows of a file   |0 ............ R)|R ............ 2R)|2R ...
    held-out runs          ==              ==   ==
    train windows    [----  ----------][---  ---  ------] ...
    eval window            [==             ==   ==]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.files import RUN_ROWS, FileIndex, ParquetIndex, read_span, scan
from nemo_ray.data.formats import format_of
from nemo_ray.data.formats.base import resolve
from nemo_ray.data.formats.fields import check_columns, check_fields
from nemo_ray.data.formats.notices import notices_of
from nemo_ray.data.held_out import choose_fraction, choose_rows
from nemo_ray.data.manifest import (
    FORMAT_VERSION,
    DataPlan,
    FileInfo,
    SourceInfo,
    Span,
    Window,
    WindowList,
    digest,
)
from nemo_ray.data.prepare import dataset_specs, encode_rows, fit, row_columns
from nemo_ray.data.splits import list_files, parse_split
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import LoadedTokenizer, TokenizerSpec, load_tokenizer
from nemo_ray.data.windows import Block, Ranges, count_rows, eval_blocks, train_blocks, without
from nemo_ray.errors import ConfigError, DataError
from nemo_ray.storage import absolute

PACKS_PER_WINDOW = 256
_PROBED_ROWS = 256


@dataclass(frozen=True)
class _Source:
    """An entry while it is planned. `taken`: the rows of each file that the split takes."""

    key: str
    spec: DatasetSpec
    files: tuple[FileInfo, ...]
    indexes: tuple[FileIndex, ...]
    taken: tuple[tuple[int, int], ...]
    rows_per_window: int
    tokens_per_row: float
    settings: str


def plan_data(data: DataSection, base_model: str, directory: str) -> DataPlan:
    """List the windows of all sources. Reads every file once (Parquet: its footer) and encodes a few rows.

    Raises ConfigError for a missing file, and for a field that no row has; DataError for files without
    usable rows.
    """
    tokenizer_spec = TokenizerSpec.of(data, base_model)
    loaded = load_tokenizer(tokenizer_spec)
    train = [
        _open_source(spec, f"datasets[{i}]", data, tokenizer_spec, loaded)
        for i, spec in enumerate(data.datasets)
    ]
    test = [
        _open_source(spec, f"test_datasets[{i}]", data, tokenizer_spec, loaded)
        for i, spec in enumerate(data.test_datasets)
    ]
    held_out = _held_out(train, data.val_set_size)
    eval_packing = data.sample_packing if data.eval_sample_packing is None else data.eval_sample_packing
    windows: list[Window] = []
    eval_windows: list[Window] = []
    infos = []
    for number, source in enumerate([*train, *test]):
        whole: list[Ranges] = [[rows] if rows[0] < rows[1] else [] for rows in source.taken]
        testing = number >= len(train)
        kept_out = whole if testing else held_out[number]
        kept = (
            [[] for _ in whole] if testing else [without(a, b) for a, b in zip(whole, kept_out, strict=True)]
        )
        size = source.rows_per_window
        windows += [_window(number, source, block, data.sample_packing) for block in train_blocks(kept, size)]
        eval_windows += [
            _window(number, source, block, eval_packing) for block in eval_blocks(kept_out, size)
        ]
        infos.append(_info(source, kept_out, testing))
    if not windows:
        raise ConfigError(
            f"val_set_size: {data.val_set_size} holds out every row (rows are held out in "
            "runs of 16); leave some to train on"
        )
    keys = [[window.key for window in windows], [window.key for window in eval_windows]]
    return DataPlan(
        directory=absolute(directory),
        fingerprint=digest(FORMAT_VERSION, keys, loaded.pad_id),
        sequence_len=data.sequence_len,
        windows=WindowList(windows),
        eval_windows=WindowList(eval_windows),
        sources=tuple(infos),
        notices=_notices(data, loaded),
        pad_id=loaded.pad_id,
    )


# -- one source -----------------------------------------------------------------------------------


def _open_source(
    spec: DatasetSpec, key: str, data: DataSection, tokenizer: TokenizerSpec, loaded: LoadedTokenizer
) -> _Source:
    spec, tokenizer = resolve(spec, data), tokenizer.for_dataset(spec)
    loaded = load_tokenizer(tokenizer)
    split = parse_split(spec.split, key)
    files: list[FileInfo] = []
    indexes: list[FileIndex] = []
    rows = 0
    for path, name, form in list_files(spec, split, key):
        index = scan(str(path), name, form)
        if isinstance(index, ParquetIndex):
            check_columns(spec, key, str(path), index.columns)
        files.append(FileInfo(str(path), name, index.identity, form, index.num_rows, rows))
        indexes.append(index)
        rows += index.num_rows
    first, last = (0, rows) if split is None else split.rows(rows)
    taken = tuple(
        (
            min(max(first - file.first_row, 0), file.num_rows),
            min(max(last - file.first_row, 0), file.num_rows),
        )
        for file in files
    )
    if first == last:
        raise DataError(f"{key}: {spec.path}{'' if spec.split is None else f' ({spec.split})'} holds no rows")
    tokens_per_row = _probe(spec, key, data, tokenizer, files, indexes, taken)
    return _Source(
        key=key,
        spec=spec,
        files=tuple(files),
        indexes=tuple(indexes),
        taken=taken,
        rows_per_window=_rows_per_window(tokens_per_row, data),
        tokens_per_row=tokens_per_row,
        settings=_settings(spec, data, loaded),
    )


def _settings(spec: DatasetSpec, data: DataSection, loaded: LoadedTokenizer) -> str:
    """Digest of all that shapes a shard, beside its rows and whether they are packed."""
    fields = format_of(spec).settings(spec)
    return digest(
        loaded.identity, fields, data.train_on_inputs, data.sequence_len, data.excess_length_strategy
    )


def _probe(
    spec: DatasetSpec,
    key: str,
    data: DataSection,
    tokenizer: TokenizerSpec,
    files: Sequence[FileInfo],
    indexes: Sequence[FileIndex],
    taken: Sequence[tuple[int, int]],
) -> float:
    """Mean tokens of the first rows: dropped and rejected ones count as 0, cut ones as cut."""
    rows: list[object] = []
    for number, (start, stop) in enumerate(taken):
        count = min(stop - start, _PROBED_ROWS - len(rows))
        if count > 0:
            span = indexes[number].span(number, start, count)
            rows += read_span(files[number].path, files[number].format, span, row_columns(spec))
    results = encode_rows(rows, spec, tokenizer, data.train_on_inputs)
    rejected = [result for result in results if isinstance(result, RowError)]
    if len(rejected) == len(results):
        _refuse(spec, key, rejected, rows)
    samples = [sample for result in results if not isinstance(result, RowError) for sample in result]
    splits, truncate = format_of(spec).splits, data.excess_length_strategy == "truncate"
    kept = [part for sample in samples for part in fit(sample, data.sequence_len, splits, truncate)]
    return sum(len(part.ids) for part in kept) / len(rows)


def _refuse(spec: DatasetSpec, key: str, rejected: list[RowError], rows: list[object]) -> None:
    """Every probed row was rejected: say why, as an error of the key where a field is not there."""
    first = rejected[0]
    check_fields(spec, key, rejected, rows[0])
    detail = f" ({first.detail})" if first.detail else ""
    raise DataError(
        f"{key}: none of the first {len(rejected)} rows of {spec.path} can be used: {first.reason}{detail}"
    )


def _rows_per_window(tokens_per_row: float, data: DataSection) -> int:
    """Rows worth about 256 packs, on a coarse grid: a slightly different probe gives the same windows."""
    wanted = float(PACKS_PER_WINDOW)
    if data.sample_packing and tokens_per_row > 0:
        wanted = PACKS_PER_WINDOW * data.sequence_len / tokens_per_row
    grid = (RUN_ROWS * step << octave for octave in range(17) for step in (4, 5, 6, 7))
    return min(grid, key=lambda rows: abs(np.log(rows / wanted)))


# -- held-out rows --------------------------------------------------------------------------------


def _held_out(sources: Sequence[_Source], val_set_size: float) -> list[list[Ranges]]:
    """For each source and file, its held-out rows."""
    parts = [
        (file.name, rows) for source in sources for file, rows in zip(source.files, source.taken, strict=True)
    ]
    chosen = iter(
        choose_rows(parts, int(val_set_size)) if val_set_size >= 1 else choose_fraction(parts, val_set_size)
    )
    return [[next(chosen) for _ in source.files] for source in sources]


# -- windows --------------------------------------------------------------------------------------


def _window(number: int, source: _Source, block: Block, packing: bool) -> Window:
    spans = tuple(source.indexes[file].span(file, start, stop - start) for file, start, stop in block)
    rows: list[tuple[str, Span]] = [
        (source.files[span.file].identity, span._replace(file=0)) for span in spans
    ]
    return Window(number, spans, count_rows(block), digest(FORMAT_VERSION, source.settings, packing, rows))


def _info(source: _Source, kept_out: list[Ranges], testing: bool) -> SourceInfo:
    return SourceInfo(
        name=source.spec.path if source.spec.split is None else f"{source.spec.path} {source.spec.split}",
        type=source.spec.type,
        files=source.files,
        num_rows=sum(stop - start for start, stop in source.taken),
        held_out_rows=sum(stop - start for ranges in kept_out for start, stop in ranges),
        rows_per_window=source.rows_per_window,
        tokens_per_row=source.tokens_per_row,
        evaluation_only=testing,
    )


def _notices(data: DataSection, loaded: LoadedTokenizer) -> tuple[str, ...]:
    """Lines that tell the user what is derived rather than given."""
    notices = []
    for spec in dataset_specs(data):
        notices += notices_of(spec, load_tokenizer(loaded.spec.for_dataset(spec)), data)
    return tuple(dict.fromkeys(notices))
