"""Files to windows: which rows are prepared together, and which are held out. Nothing is tokenized but a
probe.

A window is a block of consecutive rows of one file, worth about 256 packs; small files share one. Its key
holds the content of its rows and all that shapes a shard, so that a file more, or rows more at the end of a
file, leaves the other windows as they are. Held-out
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
from nemo_ray.data.entries import files_of
from nemo_ray.data.files import RUN_ROWS, FileIndex
from nemo_ray.data.formats import format_of
from nemo_ray.data.formats.base import resolve
from nemo_ray.data.formats.fields import check_columns
from nemo_ray.data.formats.notices import notices_of
from nemo_ray.data.held_out import choose_fraction, choose_rows
from nemo_ray.data.manifest import FORMAT_VERSION, DataPlan, FileInfo, SourceInfo, digest
from nemo_ray.data.mixing import describe_mix
from nemo_ray.data.opening import open_files, unpacked_notices
from nemo_ray.data.prepare import dataset_specs
from nemo_ray.data.probe import probe
from nemo_ray.data.splits import parse_split, taken_rows
from nemo_ray.data.tables import TableIndex
from nemo_ray.data.tokenizer import LoadedTokenizer, TokenizerSpec, load_tokenizer
from nemo_ray.data.window_list import Span, Window, WindowList
from nemo_ray.data.window_size import kept_window_size
from nemo_ray.data.windows import Block, Ranges, blocks_of, count_rows, without
from nemo_ray.errors import ConfigError, DataError
from nemo_ray.hub_cache import Say
from nemo_ray.storage import absolute

PACKS_PER_WINDOW = 256


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
    notices: tuple[str, ...]


def _print(text: str) -> None:
    print(text, flush=True)


def plan_data(data: DataSection, base_model: str, directory: str, say: Say = _print) -> DataPlan:
    """List the windows of all sources. Reads every file once (Parquet: its footer) and encodes a few rows.

    `directory`: where shards will be; compressed files are unpacked there, scans of large files remembered.
    `say` is told what is waited for, such as a download. Raises ConfigError for a missing file, and for a
    field that no row has; DataError for files without usable rows.
    """
    tokenizer_spec = TokenizerSpec.of(data, base_model)
    loaded = load_tokenizer(tokenizer_spec)
    directory = absolute(directory)
    train, test = (
        [
            _open_source(spec, f"{name}[{i}]", data, tokenizer_spec, loaded, directory, say)
            for i, spec in enumerate(specs)
        ]
        for name, specs in (("datasets", data.datasets), ("test_datasets", data.test_datasets))
    )
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
        names, size = [file.name for file in source.files], source.rows_per_window
        for rows, aligned, packing, made in (
            (kept, True, data.sample_packing, windows),
            (kept_out, False, eval_packing, eval_windows),
        ):
            blocks = blocks_of(names, rows, size, aligned=aligned)
            made += [_window(number, source, block, packing) for block in blocks]
        infos.append(_info(source, kept_out, testing))
    if not windows:
        raise ConfigError(
            f"val_set_size: {data.val_set_size} holds out every row (rows are held out in "
            "runs of 16); leave some to train on"
        )
    keys = [[window.key for window in windows], [window.key for window in eval_windows]]
    return DataPlan(
        directory=directory,
        fingerprint=digest(FORMAT_VERSION, keys, loaded.pad_id),
        sequence_len=data.sequence_len,
        windows=WindowList(windows),
        eval_windows=WindowList(eval_windows),
        sources=tuple(infos),
        notices=(
            *(line for source in (*train, *test) for line in source.notices),
            *_notices(data, loaded),
            *describe_mix(infos),
        ),
        pad_id=loaded.pad_id,
    )


# -- one source -----------------------------------------------------------------------------------


def _open_source(
    spec: DatasetSpec,
    key: str,
    data: DataSection,
    tokenizer: TokenizerSpec,
    loaded: LoadedTokenizer,
    directory: str,
    say: Say,
) -> _Source:
    spec, tokenizer = resolve(spec, data), tokenizer.for_dataset(spec)
    loaded = load_tokenizer(tokenizer)
    split = parse_split(spec.split, key)
    named = files_of(spec, split, key, key.startswith("test_"), say)
    opened = open_files(named, directory)
    files: list[FileInfo] = []
    rows = 0
    for file in opened:
        if isinstance(file.index, TableIndex):
            check_columns(spec, key, file.path, file.index.columns)
        files.append(
            FileInfo(file.path, file.name, file.index.identity, file.format, file.index.num_rows, rows)
        )
        rows += file.index.num_rows
    first, last = taken_rows(spec, split, rows)
    taken = tuple(
        (
            min(max(first - file.first_row, 0), file.num_rows),
            min(max(last - file.first_row, 0), file.num_rows),
        )
        for file in files
    )
    if first == last:
        part = "" if spec.split is None else f" ({spec.split})"
        shard = "" if spec.shards is None else f" for part {spec.shards_idx} of {spec.shards} shards"
        raise DataError(f"{key}: {spec.path}{part} holds no rows{shard}")
    indexes = tuple(file.index for file in opened)
    tokens_per_row = probe(spec, key, data, tokenizer, files, indexes, taken)
    settings = _settings(spec, data, loaded)
    wanted = _rows_per_window(tokens_per_row, data)
    known_by = [spec.path, spec.name, spec.data_files, settings, data.sample_packing, PACKS_PER_WINDOW]
    return _Source(
        key=key,
        spec=spec,
        files=tuple(files),
        indexes=indexes,
        taken=taken,
        rows_per_window=kept_window_size(directory, digest(*known_by), wanted, last - first),
        tokens_per_row=tokens_per_row,
        settings=settings,
        notices=unpacked_notices(opened, key, directory),
    )


def _settings(spec: DatasetSpec, data: DataSection, loaded: LoadedTokenizer) -> str:
    """Digest of all that shapes a shard, beside its rows and whether they are packed."""
    fields = format_of(spec).settings(spec)
    return digest(
        loaded.identity, fields, data.train_on_inputs, data.sequence_len, data.excess_length_strategy
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
    rows: list[tuple[str, str, Span]] = [
        (source.files[span.file].format, source.indexes[span.file].content(span), span._replace(file=0))
        for span in spans
    ]
    return Window(number, spans, count_rows(block), digest(FORMAT_VERSION, source.settings, packing, rows))


def _info(source: _Source, kept_out: list[Ranges], testing: bool) -> SourceInfo:
    num_rows = sum(stop - start for start, stop in source.taken)
    held_out = sum(stop - start for ranges in kept_out for start, stop in ranges)
    return SourceInfo(
        name=source.spec.path if source.spec.split is None else f"{source.spec.path} {source.spec.split}",
        type=source.spec.type,
        files=source.files,
        num_rows=num_rows,
        held_out_rows=held_out,
        rows_per_window=source.rows_per_window,
        tokens_per_row=source.tokens_per_row,
        evaluation_only=testing,
        weight=None if testing else source.spec.weight,
    )


def _notices(data: DataSection, loaded: LoadedTokenizer) -> tuple[str, ...]:
    """Lines that tell the user what is derived rather than given."""
    notices = []
    for spec in dataset_specs(data):
        notices += notices_of(spec, load_tokenizer(loaded.spec.for_dataset(spec)), data)
    return tuple(dict.fromkeys(notices))
