"""A disk without room, told as that: neither a worker's fault nor gone after a restart."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from nemo_ray.errors import NO_ROOM, DiskError, NemoRayError
from nemo_ray.urls import is_url

FULL_BYTES = 16 * 2**20
"""With less than this left a disk is called full: what failed to fit may have been removed again."""


def free_bytes(folder: str) -> int | None:
    """On the disk of `folder` where that is full, else None; also where there is no such folder."""
    if is_url(folder) or not os.path.isdir(folder):
        return None
    free = shutil.disk_usage(folder).free
    return free if free < FULL_BYTES else None


@contextlib.contextmanager
def told(output_dir: str) -> Iterator[None]:
    """Raises: DiskError in place of an OSError that says that there is no room."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NemoRayError) or error.errno not in NO_ROOM:
            raise
        raise DiskError(_line(output_dir, error)) from error


def _line(output_dir: str, error: OSError) -> str:
    free = free_bytes(output_dir)
    if free is None:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}; make room there"
    return (
        f"output_dir: {output_dir} could not be written: the disk is full ({free / 2**20:.1f} MiB free); "
        "make room, and go on with resume_from_checkpoint=auto"
    )
