"""Scans that are remembered in the prepared directory, so that a large file is read through once, not at
each start.

A scan is known by path, size and time of change. Only files that are expensive to scan are remembered.
"""

import io
import zipfile

import numpy as np

from nemo_ray.data.index import HASHED_BYTES, changed, facts_of
from nemo_ray.data.lines import LinesIndex, scan_lines
from nemo_ray.data.manifest import FileFormat, digest
from nemo_ray.storage import FileFacts, file_facts, is_url, open_input, publish_bytes

_VERSION = 1
"""Raised whenever the arrays of a scan mean something else."""


def remembered_scan(path: str, file_format: FileFormat, known_as: str | None, directory: str) -> LinesIndex:
    """`lines.scan_lines`, or what it gave for the same file before. Raises DataError, OSError."""
    facts = facts_of(path)
    if not is_url(path) and facts.size_bytes < HASHED_BYTES:
        return scan_lines(path, file_format, facts, known_as)
    key = digest(_VERSION, path, file_format, facts.size_bytes, facts.modified_ns, known_as)
    place = f"{directory}/scans/{key}.npz"
    found = _recall(place, path, file_format, facts, known_as)
    if found is not None:
        return found
    index = scan_lines(path, file_format, facts, known_as)
    if facts_of(path) != facts:
        raise changed(path)  # while it was read
    buffer = io.BytesIO()
    np.savez(buffer, num_rows=np.int64(index.num_rows), offsets=index.offsets, blocks=index.blocks)
    publish_bytes(place, buffer.getvalue())
    return index


def _recall(
    place: str, path: str, file_format: FileFormat, facts: FileFacts, known_as: str | None
) -> LinesIndex | None:
    if file_facts(place) is None:
        return None
    try:
        with open_input(place) as file:
            arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
            return LinesIndex(
                path=path,
                format=file_format,
                num_rows=int(arrays["num_rows"]),
                size_bytes=facts.size_bytes,
                offsets=arrays["offsets"],
                blocks=arrays["blocks"],
                known_as=known_as,
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # damaged: it is written again
