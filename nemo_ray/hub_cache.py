"""How large files of the hub reach this node's cache: one process at a time, resumable, into enough room.

Owns the lock, the look at the disk, the transfer, and one line for each error. Which files are wanted is
the business of hub.py (models) and hub_datasets.py.

huggingface_hub 2 begins a file again when its process was killed. So the bytes of a large file are collected
here, beside the place where its cache expects them, and the rest (links, listings) is left to it:

    blobs/<sha256>.nemo_ray.incomplete  --(whole, digest right)-->  blobs/<sha256>
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nemo_ray.errors import NO_ROOM, NemoRayError
from nemo_ray.urls import redact

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

Say = Callable[[str], None]

_NUM_CONNECTIONS = 4
_TRIES = 5
"""Attempts in a row that bring no byte, before a file is given up."""
_RETRY_AFTER_S = 1.0
_SAY_EVERY_S = 10.0
_TOLD_AFTER_S = 1.0
_ROOM_FACTOR = 1.05
_HTTP_MAX_BYTES = 50 * 10**9
_WRITE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Repository(NamedTuple):
    """A repository, and the keys of the configuration that name it and its revision, for messages."""

    name: str
    kind: Literal["model", "dataset"] = "model"
    key: str = "base_model"
    revision_key: str = "revision_of_model"

    @property
    def folder_name(self) -> str:
        """Its folder in the cache."""
        return f"{self.kind}s--{self.name.replace('/', '--')}"


class RefusedError(Exception):
    """A line for the user; the caller of hub.py decides which error it becomes."""


def cache_folder() -> Path:
    """Where huggingface_hub keeps repositories: HF_HUB_CACHE, or hub/ in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def show_bytes(num_bytes: int) -> str:
    """As disks are sold: 63.2 GB, 12.0 MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def no_bar() -> Any:
    """For huggingface_hub's `tqdm_class`: its bars would be drawn into the driver's lines and into logs."""
    from huggingface_hub.utils import tqdm

    return partial(tqdm, disable=True)


# -- one process of a node ------------------------------------------------------------------------


@contextlib.contextmanager
def node_lock(repository: Repository, say: Say) -> Iterator[None]:
    """Held by the one process that fetches it into this cache. The system frees it if that is killed."""
    from filelock import FileLock, Timeout

    path = cache_folder() / ".locks" / repository.folder_name / "nemo_ray.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_TOLD_AFTER_S)
    except Timeout:
        say(f"waiting for another process that downloads {repository.name} (lock: {path})")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


# -- room -----------------------------------------------------------------------------------------


def _blob(folder: Path, file: "RepoFile") -> Path | None:
    """The content's place in the cache; None for what huggingface_hub fetches itself: small files, which lie
    in git, and those too large for plain HTTP."""
    if file.lfs is None or file.size > _HTTP_MAX_BYTES:
        return None
    return folder.parents[1] / "blobs" / file.lfs.sha256


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.nemo_ray.incomplete")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _num_bytes_here(folder: Path, file: "RepoFile") -> int:
    blob = _blob(folder, file)
    if (folder / file.path).exists() or (blob is not None and blob.exists()):
        return file.size
    return min(_size(_incomplete(blob)), file.size) if blob is not None else 0


def require_room(repository: Repository, folder: Path, files: Sequence["RepoFile"]) -> None:
    """Refuse what the disk of the cache cannot take, before the first byte. `folder`: of the snapshot."""
    missing = sum(file.size - _num_bytes_here(folder, file) for file in files)
    cache = cache_folder().absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if missing * _ROOM_FACTOR > free:
        raise RefusedError(
            f"{repository.key}: {repository.name} needs {show_bytes(int(missing * _ROOM_FACTOR))} more in "
            f"{cache}, where "
            f"{show_bytes(free)} are free; make room, or set HF_HOME to a folder on a larger disk"
        )


# -- transfer -------------------------------------------------------------------------------------


def fetch_blobs(repository: Repository, folder: Path, files: Sequence["RepoFile"], say: Say) -> None:
    """Fetch the contents of large files into the cache, a few at a time; goes on where it was broken off."""
    blobs = [(file, blob) for file in files if (blob := _blob(folder, file)) is not None]
    total = sum(file.size for file in files)
    stop = threading.Event()
    with ThreadPoolExecutor(_NUM_CONNECTIONS, thread_name_prefix="hub") as pool:
        futures = [pool.submit(_fetch_blob, repository, folder.name, *pair, stop) for pair in blobs]
        try:
            waiting = True
            while waiting:
                done = sum(_num_bytes_here(folder, file) for file in files)
                say(f"downloading {repository.name}: {show_bytes(done)} of {show_bytes(total)}")
                ended, pending = wait(futures, timeout=_SAY_EVERY_S, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                waiting = bool(pending)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _StoppedError(Exception):
    """Another file failed, or the process is to end."""


class _Sink(io.BufferedWriter):
    """Appends to a file until it is told to stop."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._stop = stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise _StoppedError
        return super().write(data)


def _fetch_blob(
    repository: Repository, commit: str, file: "RepoFile", blob: Path, stop: threading.Event
) -> None:
    """One file, whole and with the digest that the hub gives, or an error."""
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    incomplete = _incomplete(blob)
    for last in (False, True):
        if _size(incomplete) > file.size:
            incomplete.unlink()
        _collect(repository, commit, file, incomplete, stop)
        with open(incomplete, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == blob.name:
                break
        incomplete.unlink()
        if last:
            raise RefusedError(
                f"{repository.key}: {file.path} of {repository.name} came twice with another content than "
                "the hub lists; try again later"
            )
    os.replace(incomplete, blob)


def _collect(
    repository: Repository, commit: str, file: "RepoFile", path: Path, stop: threading.Event
) -> None:
    """Append what is missing; after a cut connection go on from the last byte."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # Compressed, a part of the file would not be a part of the transfer.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    url = hf_hub_url(repository.name, file.path, repo_type=repository.kind, revision=commit)
    tries = _TRIES
    while True:
        had = _size(path)
        try:
            with _Sink(path, stop) as sink:
                http_get(
                    url,
                    sink,
                    resume_size=had,
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=no_bar(),
                )
            return
        except Exception as error:  # those of the HTTP client have no base in huggingface_hub
            tries = _TRIES if _size(path) > had else tries - 1
            if not _may_pass(error) or tries == 0:
                raise
        if stop.wait(_RETRY_AFTER_S):
            raise _StoppedError


def _may_pass(error: Exception) -> bool:
    """Whether another attempt can go well: the network's fault, or a busy server's."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, _StoppedError) and not (
        isinstance(error, OSError) and error.errno is not None
    )


# -- errors ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(repository: Repository, revision: str, failure: type[NemoRayError]) -> Iterator[None]:
    """Turn what goes wrong inside into a `failure` of one line."""
    try:
        yield
    except NemoRayError:
        raise
    except RefusedError as error:
        raise failure(str(error)) from None
    except Exception as error:
        raise failure(redact(_line(error, repository, revision))) from error


def _line(error: Exception, repository: Repository, revision: str) -> str:
    """Key, value, rule and remedy. Never with a header of a request: it would show the token."""
    from huggingface_hub import constants, errors, get_token

    endpoint = constants.ENDPOINT
    name, kind, key, revision_key = repository
    site = endpoint if kind == "model" else f"{endpoint}/datasets"
    if isinstance(error, errors.GatedRepoError):
        page = f"accept the licence on {site}/{name}"
        if get_token() is None:
            return f"{key}: {name} is gated; {page}, and set HF_TOKEN to a token of that account"
        return f"{key}: {name} is gated, and the token in use has no access; {page} with its account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{key}: {name} is no folder here and no {kind} at {endpoint}, or a private one; correct it, "
            f"or set HF_TOKEN{'' if get_token() is None else ' (the token in use has no access)'}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{revision_key}: {revision} is no branch, tag or commit of {name}; see {site}/{name}"
    if isinstance(error, errors.HFValidationError):
        return f"{key}: {name} is no folder here, and no id of a hub {kind} (owner/name); correct it"
    cause = error.__cause__ or error
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
        return f"{key}: {endpoint} refuses {name} ({_status(cause)}); set HF_TOKEN to one that may read it"
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{key}: {name}: {endpoint} answered {_status(cause)}; try again later"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{key}: the disk of {cache_folder()} is full; make room (downloads go on where they ended)"
    if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
        return f"{key}: {cache_folder()} is not writable ({error.strerror}); set HF_HOME to another folder"
    if constants.is_offline_mode():
        option = "" if kind == "model" else " --repo-type dataset"
        return (
            f"{key}: {name} is no folder here, and {cache_folder()} holds no complete copy of it; unset "
            f"HF_HUB_OFFLINE, or run `hf download {name}{option}` on a machine with a network"
        )
    words = str(cause).strip().splitlines() or [""]
    return (
        f"{key}: {name} is no folder here, and {endpoint} cannot be reached ({type(cause).__name__}: "
        f"{words[0][:200]}); correct it, or check the network and HF_ENDPOINT"
    )


def _status(error: Any) -> str:
    return f"{error.response.status_code} {error.response.reason_phrase}".strip()
