"""Files by path or URL: reading them wherever they lie, and atomic writes, whole or not at all.

Owns how things reach a shared file system or an object store. What they mean is the callers' business.
"""

import io
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from pyarrow import fs

_REMOTE_READ_BYTES = 4 << 20
"""Smallest read of an object store: a request costs as much time as some megabytes."""


class FileFacts(NamedTuple):
    """What a file system says of a file without reading it."""

    size_bytes: int
    modified_ns: int


def is_url(path: str) -> bool:
    """Whether a path names an object store, as in `s3://bucket/key`."""
    return "://" in path


def file_system(path: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system of a path or URL, and the path within it."""
    if is_url(path):
        system, inner = fs.FileSystem.from_uri(path)
        return system, inner
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def open_input(path: str) -> BinaryIO:
    """Open a file for reading, from any place in it. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = file_system(path)
    return cast(BinaryIO, io.BufferedReader(system.open_input_file(inner), _REMOTE_READ_BYTES))


def file_facts(path: str) -> FileFacts | None:
    """Size and time of change; None where there is no such file. Raises OSError."""
    system, inner = file_system(path)
    info = system.get_file_info(inner)
    if info.type != fs.FileType.File:
        return None
    return FileFacts(info.size, info.mtime_ns)


def list_files(folder: str) -> list[str]:
    """Paths (or URLs) of all files below a folder, sorted; [] where there is no such folder."""
    system, inner = file_system(folder)
    selector = fs.FileSelector(inner, allow_not_found=True, recursive=True)
    found = [info.path for info in system.get_file_info(selector) if info.type == fs.FileType.File]
    if is_url(folder):
        scheme = folder.split("://", 1)[0]
        found = [f"{scheme}://{path}" for path in found]
    return sorted(found)


def _aside(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def publish_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there, so that no reader ever sees a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _aside(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read one JSON file; raises FileNotFoundError or json.JSONDecodeError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def publish_folder(partial: str | Path, path: str | Path) -> None:
    """Give a finished folder its name, replacing what was there."""
    partial, path = Path(partial), Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        os.replace(partial, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(partial, path)


def remove_tree(path: str | Path) -> None:
    """Delete a folder in one visible step: it is renamed first, so that no half-deleted one is ever read."""
    path = Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        shutil.rmtree(retired)
