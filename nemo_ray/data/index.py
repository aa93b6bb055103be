"""What a scan of a data file gives: its rows, where they lie, and what their content is known by.

Owns the common form and the identity of files. The formats are in lines.py, tables.py and files.py.
"""

import hashlib
from typing import Protocol

from nemo_ray.data.manifest import digest
from nemo_ray.data.window_list import Span
from nemo_ray.errors import ConfigError, DataError
from nemo_ray.storage import FileFacts, file_facts, is_url, open_input

RUN_ROWS = 16
"""Rows are addressed, and held out, in runs of this many."""

BLANK_LINE = "blank line"

HASHED_BYTES = 64 << 20
"""Smaller files on a file system are identified by their content, larger ones by name, size and time."""


class FileIndex(Protocol):
    """What a scan found."""

    @property
    def num_rows(self) -> int: ...

    @property
    def identity(self) -> str:
        """Another one means other rows."""
        ...

    def span(self, file: int, first_row: int, num_rows: int) -> Span:
        """Address the rows [first_row, first_row + num_rows)."""
        ...

    def content(self, span: Span) -> str:
        """What the bytes of a span are known by: as little of the rest of the file as can be."""
        ...


def facts_of(path: str) -> FileFacts:
    """Size and time of change. Raises ConfigError for a file that is gone, OSError."""
    facts = file_facts(path)
    if facts is None:
        raise ConfigError(f"datasets: {path} is no longer there; restore it, or correct the path")
    return facts


def whole_identity(path: str, name: str, facts: FileFacts) -> str:
    """Of a file that is read in parts only: content where that is cheap, else name, size and time."""
    if is_url(path) or facts.size_bytes >= HASHED_BYTES:
        return digest(name, facts.size_bytes, facts.modified_ns)
    with open_input(path) as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def is_read_error(error: Exception) -> bool:
    """Whether a file could not be read, where pyarrow tells of damaged content too: by a bare OSError."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def changed(path: str) -> DataError:
    """For rows that are not where the plan says."""
    return DataError(f"{path} has changed since this run's data was planned; start the run again")
