"""From the files that an entry names to files that are scanned: unpacked, their form told, in parallel."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from nemo_ray.data.files import FileIndex, scan, sniff_json
from nemo_ray.data.index import facts_of, whole_identity
from nemo_ray.data.lines import LINE_FORMATS, PARALLEL_BYTES
from nemo_ray.data.listing import NamedFile
from nemo_ray.data.manifest import FileFormat
from nemo_ray.data.remembered import remembered_scan
from nemo_ray.data.unpack import split_compression, unpack
from nemo_ray.errors import ConfigError
from nemo_ray.hub_cache import show_bytes
from nemo_ray.hub_datasets import local_path
from nemo_ray.storage import is_url

_MAX_THREADS = 16


@dataclass(frozen=True)
class OpenedFile:
    """A scanned file. `path`: where its rows are read; `unpacked`: whether that is a copy made here."""

    path: str
    name: str
    format: FileFormat
    index: FileIndex
    unpacked: bool


def open_files(files: Sequence[NamedFile], directory: str) -> list[OpenedFile]:
    """Scan the files, in their order. `directory`: the prepared one, for copies and remembered scans.

    Several at a time, except large files of lines, of which one takes all threads. Raises ConfigError or
    DataError.
    """
    open_one = partial(_open, directory=directory)
    large = [file for file in files if _takes_all_threads(file)]
    opened = {file: open_one(file) for file in large}
    small = [file for file in files if file not in opened]
    with ThreadPoolExecutor(min(_MAX_THREADS, 4 * (os.cpu_count() or 1))) as pool:
        opened.update(zip(small, pool.map(open_one, small), strict=True))
    return [opened[file] for file in files]


def _takes_all_threads(file: NamedFile) -> bool:
    if file.format not in ("jsonl", "json", "text") or split_compression(file.name)[1] is not None:
        return False
    return facts_of(local_path(file.path)).size_bytes >= PARALLEL_BYTES


def _open(file: NamedFile, directory: str) -> OpenedFile:
    path, known_as = file.path, file.known_as
    try:
        readable = local_path(path)
        unpacked = split_compression(file.name)[1] is not None
        if unpacked:
            if is_url(directory) and known_as is None:
                known_as = whole_identity(readable, file.name, facts_of(readable))
            path = readable = unpack(readable, file.name, directory)
        form = sniff_json(readable, file.format) if file.format in ("json", "jsonl") else file.format
        if form in LINE_FORMATS:
            # What lies here is known by its content: rows that are added at the end leave the others alone.
            known_as = known_as if is_url(readable) else None
            if known_as is None and is_url(readable):
                known_as = whole_identity(readable, file.name, facts_of(readable))
            index: FileIndex = remembered_scan(readable, form, known_as, directory)
        else:
            index = scan(readable, file.name, form, known_as)
    except OSError as error:
        raise ConfigError(f"datasets: {file.path} cannot be read: {error.strerror or error}") from None
    return OpenedFile(path, file.name, form, index, unpacked)


def unpacked_notices(files: Sequence[OpenedFile], key: str, directory: str) -> tuple[str, ...]:
    """What the compressed files of an entry cost, in a line; none where there are none."""
    sizes = [facts_of(file.path).size_bytes for file in files if file.unpacked]
    if not sizes:
        return ()
    return (
        f"{key}: {len(sizes)} compressed file{'s' if len(sizes) > 1 else ''} cannot be read in parts, so the "
        f"content was unpacked once: {show_bytes(sum(sizes))} in {directory}/unpacked, to be deleted when no "
        "run prepares data from there any more",
    )
