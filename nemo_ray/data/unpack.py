"""Compressed files, which have no random access: unpacked once into the prepared directory."""

import os
import uuid

import pyarrow as pa
from pyarrow import fs

from nemo_ray.data.index import facts_of, is_read_error
from nemo_ray.data.manifest import digest
from nemo_ray.errors import DataError
from nemo_ray.storage import file_facts, file_system, is_url, open_input

COMPRESSIONS: dict[str, str] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
"""Suffix -> pyarrow's name."""

_COPIED_BYTES = 4 << 20


def split_compression(path: str) -> tuple[str, str | None]:
    """`rows.jsonl.gz` -> (`rows.jsonl`, `gzip`); None where the name speaks of no compression."""
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix.lower())
    return (path, None) if compression is None else (stem, compression)


def unpack(source: str, name: str, directory: str) -> str:
    """The path of the content of a compressed file below `directory`, written there if it is not yet.

    `name`: of the file in the dataset; `source`: where it can be read. Two processes that unpack the same
    file write the same content. Raises DataError for a damaged file, OSError.
    """
    inner_name, compression = split_compression(name)
    assert compression is not None
    facts = facts_of(source)
    key = digest(source, facts.size_bytes, facts.modified_ns)
    target = f"{directory}/unpacked/{key}{os.path.splitext(inner_name)[1].lower()}"
    if file_facts(target) is not None:
        return target
    system, inner = file_system(target)
    partial = f"{inner}.{uuid.uuid4().hex[:12]}.partial"
    if not is_url(target):
        system.create_dir(os.path.dirname(inner), recursive=True)
    try:
        with (
            open_input(source) as packed,
            pa.input_stream(packed, compression=compression) as stream,
            system.open_output_stream(partial, compression=None) as output,
        ):
            while data := stream.read(_COPIED_BYTES):
                output.write(data)
        system.move(partial, inner)
    except (pa.ArrowException, OSError) as error:
        if system.get_file_info(partial).type == fs.FileType.File:
            system.delete_file(partial)
        if is_read_error(error):
            raise
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{source} is damaged ({words[0]}); compress it again") from None
    return target
