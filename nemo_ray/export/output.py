"""The folder that an export fills: there whole, or not at all."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.storage import publish_folder

_GIB = 2**30
_PARTIAL = ".{name}.{mark}.partial"


def require_output(output: Path, num_bytes: int) -> None:
    """Refuse a folder that holds something, and a disk without room for `num_bytes`. Changes nothing."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file; name a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output: {output} is not empty; name a folder that does not exist yet")
    parent = next(folder for folder in (output, *output.parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConfigError(
            f"--output: {parent} has {free / _GIB:.1f} GiB free, and {num_bytes / _GIB:.1f} GiB are written; "
            "name a folder on another disk"
        )


def leftovers(output: Path) -> list[Path]:
    """What exports to `output` left behind that were killed (or are still at work)."""
    return sorted(output.parent.glob(_PARTIAL.format(name=glob.escape(output.name), mark="*")))


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `output` where the block ends without an error.

    Raises: CheckpointError where it cannot be written; nothing of it is left then.
    """
    partial = output.with_name(_PARTIAL.format(name=output.name, mark=uuid.uuid4().hex[:12]))
    try:
        partial.mkdir(parents=True)
        yield partial
        publish_folder(partial, output)
    except OSError as error:
        raise CheckpointError(f"--output: {output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file and see it on the disk, since the folder's name will promise it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
