"""Files by path or URL: reading them wherever they lie, and atomic writes, whole or not at all.

Owns how things reach a shared file system or an object store. What they mean is the callers' business; how a
store is spoken to is object_store.py's. Errors of a store are StorageError, which is an OSError.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from pyarrow import fs

from nemo_ray.hub_datasets import is_streamed
from nemo_ray.hub_stream import HubFile, size_of
from nemo_ray.object_store import attempt, connect, no_bucket
from nemo_ray.ranges import RangeFile
from nemo_ray.urls import is_url as is_url
from nemo_ray.urls import parse

_REMOTE_READ_BYTES = 4 << 20
"""Smallest read of an object store: a request costs as much time as some megabytes."""

_ONE_REQUEST_BYTES = 4 << 20
"""Smaller objects are written by one request, larger ones in parts."""

_IN_FLIGHT_BYTES = 64 << 20
"""Of an object that are on their way at once: S3's parts are sent beside each other, from copies."""

_AT_ONCE_BYTES = 16 << 20
"""Of a file that is copied."""

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{12}\.partial")


class FileFacts(NamedTuple):
    """What a file system says of a file without reading it."""

    size_bytes: int
    modified_ns: int


def join(folder: str, *names: str) -> str:
    """The path or URL of a name in a folder."""
    return "/".join([folder.rstrip("/"), *names]) if is_url(folder) else os.path.join(folder, *names)


def absolute(path: str) -> str:
    """A path that holds in every folder; a URL as it is."""
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def file_system(path: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system of a path or URL, and the path within it. Raises StorageError."""
    if is_url(path):
        location = parse(path)
        return connect(location), location.inner
    return fs.LocalFileSystem(), absolute(path)


# -- reading --------------------------------------------------------------------------------------


def open_input(path: str) -> BinaryIO:
    """Open a file for reading, from any place in it. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(_remote(path), _REMOTE_READ_BYTES))


def open_ranges(path: str) -> io.RawIOBase:
    """Open a file for reading just what is asked for: of an object, each `readinto` is one request.

    Raises OSError.
    """
    return _remote(path) if is_url(path) else open(path, "rb", buffering=0)


class _StoredFile(RangeFile):
    """An object, of which each range is asked for again where a request failed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        super().__init__(attempt(url, "opening", lambda system, path: self._open(system, path).size()))

    def _open(self, system: fs.FileSystem, path: str) -> Any:
        if self._file is None:
            self._file = system.open_input_file(path)
        return self._file

    def read_range(self, start: int, count: int) -> bytes:
        def work(system: fs.FileSystem, path: str) -> bytes:
            try:
                data = bytes(self._open(system, path).read_at(count, start))
            except OSError:
                self._file = None
                raise
            if len(data) < count:
                self._file = None
                raise OSError(f"{len(data)} bytes came instead of {count}")
            return data

        return attempt(self._url, "reading", work)


def _remote(path: str) -> RangeFile:
    return HubFile(path) if is_streamed(path) else _StoredFile(path)


def read_bytes(path: str | Path) -> bytes:
    """A file's content. Raises OSError."""
    path = str(path)
    if not is_url(path):
        return Path(path).read_bytes()

    def work(system: fs.FileSystem, inner: str) -> bytes:
        with system.open_input_file(inner) as file:
            data = bytes(file.read())
            if len(data) < file.size():
                raise OSError(f"{len(data)} bytes came instead of {file.size()}")
            return data

    return attempt(path, "reading", work)


def read_json(path: str | Path) -> Any:
    """Read one JSON file; raises FileNotFoundError or json.JSONDecodeError."""
    return json.loads(read_bytes(path))


def exists(path: str) -> bool:
    """Whether there is such a file. One request where it is an object. Raises OSError."""
    if not is_url(path):
        return os.path.exists(path)
    try:
        attempt(path, "looking it up", lambda system, inner: system.open_input_file(inner).close())
    except FileNotFoundError:
        return False
    return True


def file_facts(path: str) -> FileFacts | None:
    """Size and time of change; None where there is no such file. Raises OSError."""
    if is_streamed(path):
        return FileFacts(size_of(path), 0)  # of one commit, which does not change
    if is_url(path):
        info = attempt(path, "looking it up", lambda system, inner: system.get_file_info(inner))
    else:
        system, inner = file_system(path)
        info = system.get_file_info(inner)
    if info.type != fs.FileType.File:
        return None
    return FileFacts(info.size, info.mtime_ns)


# -- listing --------------------------------------------------------------------------------------


def list_files(folder: str) -> list[str]:
    """Paths (or URLs) of all files below a folder, sorted; [] where there is no such folder."""
    return sorted(_list(folder, recursive=True))


def list_names(folder: str) -> set[str]:
    """Names of the files in a folder, not in those below it; none where there is no such folder."""
    if is_url(folder):
        return {path.rsplit("/", 1)[1] for path in _list(folder)}
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def list_folders(url: str) -> set[str]:
    """Names of the folders in a folder of a store; none where there is no such folder. Raises OSError.

    pyarrow 26 lists no folders of Google Cloud Storage, where they are but parts of names: they are found by
    all that lies in them.
    """
    if parse(url).scheme == "gs":
        start = len(url.rstrip("/")) + 1
        inside = (path[start:].split("/") for path in list_files(url))
        return {names[0] for names in inside if len(names) > 1}
    return {path.rstrip("/").rsplit("/", 1)[1] for path in _list(url, kind=fs.FileType.Directory)}


def _list(folder: str, recursive: bool = False, kind: fs.FileType = fs.FileType.File) -> list[str]:
    def work(system: fs.FileSystem, inner: str) -> list[str]:
        selector = fs.FileSelector(inner.rstrip("/"), allow_not_found=False, recursive=recursive)
        found = system.get_file_info(selector)
        return [info.path for info in found if info.type == kind]

    try:
        if not is_url(folder):
            return work(*file_system(folder))
        found = attempt(folder, "listing", work)
    except FileNotFoundError:
        return []
    # What stands before the container, or names the account after it, is not in pyarrow's paths.
    location = parse(folder)
    start = folder[: len(folder) - len(location.key)].rstrip("/")
    return [f"{start}/{path[len(location.container) + 1 :]}" for path in found]


# -- writing --------------------------------------------------------------------------------------


def _aside(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def publish_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there, so that no reader ever sees a part of it.

    Raises OSError.
    """
    publish_blocks(path, lambda: [data], len(data))


def upload(path: Path, url: str) -> None:
    """Copy a file to a store, without all of it in memory. Raises OSError."""

    def blocks() -> Iterable[bytes]:
        with open(path, "rb") as file:
            while block := file.read(_AT_ONCE_BYTES):
                yield block

    publish_blocks(url, blocks, path.stat().st_size)


def download(url: str, path: Path) -> None:
    """Copy an object to a new file, without all of it in memory. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_input(url) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _AT_ONCE_BYTES)


def publish_blocks(
    path: str | Path, blocks: Callable[[], Iterable[bytes | memoryview]], size_bytes: int
) -> None:
    """As publish_bytes, without all of it in memory a second time.

    An object appears when its last request succeeds: it needs no other name to be written under.

    Args:
        blocks: of some megabytes each; called again for every attempt. They lie in memory: giving them
            raises no OSError.
        size_bytes: of them all.

    Raises OSError.
    """
    if is_url(str(path)):
        _put(str(path), blocks, size_bytes)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _aside(path)
    try:
        with open(partial, "wb") as file:
            file.writelines(blocks())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _put(url: str, blocks: Callable[[], Iterable[bytes | memoryview]], size_bytes: int) -> None:
    def work(system: fs.FileSystem, inner: str) -> None:
        # No `with`: at an error it would close the stream, which publishes what was written so far.
        stream = system.open_output_stream(inner, compression=None)  # not by the name's suffix
        try:
            _write_blocks(system, stream, blocks())
        except OSError:
            # A request has failed, and so closing fails: here, not where the stream is freed, which would
            # hold up the other threads.
            with contextlib.suppress(OSError):
                stream.close()
            raise
        except BaseException:
            # No request has failed, so freeing the stream would publish a part (pyarrow 26), and pyarrow
            # has no other way to end it: it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
            raise
        stream.close()

    try:
        attempt(url, "writing", work, large=size_bytes > _ONE_REQUEST_BYTES)
    except FileNotFoundError:  # so Google Cloud Storage says it
        raise no_bucket(url, "writing") from None


def _write_blocks(system: fs.FileSystem, stream: Any, blocks: Iterable[bytes | memoryview]) -> None:
    """Into a stream that is not closed yet."""
    in_flight = 0
    for block in blocks:
        stream.write(block)
        in_flight += len(block)
        if in_flight >= _IN_FLIGHT_BYTES and system.type_name == "s3":
            stream.flush()  # waits for its parts; that of an Azure stream would publish them
            in_flight = 0


def remove_partials(folder: str, older_than_s: float) -> None:
    """Delete what killed writers of `publish_bytes` have left in a folder; a store has no such files."""
    if is_url(folder):
        return
    newest = time.time() - older_than_s
    for name in list_names(folder):
        path = Path(folder, name)
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if _PARTIAL.fullmatch(name) and path.stat().st_mtime < newest:
                path.unlink()


def publish_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove(path: str) -> None:
    """Delete a file, if it is there. Raises OSError."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        return
    try:
        attempt(path, "deleting", lambda system, inner: system.delete_file(inner))
    except FileNotFoundError:
        return


def remove_folder(folder: str | Path, first: str | None = None) -> None:
    """Delete a folder with all that is in it, if it is there: its file `first` before the others, so that
    what is complete by that file never passes for complete on the way. Raises OSError.
    """
    folder = str(folder)
    if not is_url(folder):
        remove_tree(folder)
        return
    assert parse(folder).key, "a folder, not the bucket"
    if first is not None:
        remove(join(folder, first))
    with contextlib.suppress(FileNotFoundError):
        attempt(folder, "deleting", lambda system, inner: system.delete_dir(inner.rstrip("/")))


# -- folders, on file systems only ----------------------------------------------------------------


def publish_folder(partial: str | Path, path: str | Path) -> None:
    """Give a finished folder its name, replacing what was there. The name outlives a power failure."""
    partial, path = Path(partial), Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        try:
            os.replace(partial, path)
        except OSError:
            os.replace(retired, path)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder written to the disk, not only to memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(path: str | Path) -> None:
    """Delete a folder in one visible step: it is renamed first, so that no half-deleted one is ever read."""
    path = Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        shutil.rmtree(retired)
