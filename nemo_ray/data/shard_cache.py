"""Shards of an object store, copied to this node when they are first read, and memory-mapped there.

The copies are shared by all processes of a user on the node; those unused for longest make room for new ones.
Where shards are local files nothing is copied.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_ray.data.shards import DamagedShardError, Shard
from nemo_ray.errors import DataError
from nemo_ray.storage import publish_bytes, read_bytes
from nemo_ray.urls import is_url

LIMIT_BYTES = 16 << 30
"""Of all copies; never more than half of what the disk has for them."""

_LOCK_WITHIN_S = 600.0
_LOCKS = 16


def open_shard(path: str) -> Shard:
    """The shard at a path or URL, verified. Raises FileNotFoundError, DataError or StorageError."""
    return ShardCache(default_folder()).open(path) if is_url(path) else Shard(path)


def default_folder() -> Path:
    """In the directory for temporary files (TMPDIR), one for each user."""
    return Path(tempfile.gettempdir()) / f"nemo_ray-{os.getuid()}" / "shards"


class ShardCache:
    """A folder of copies."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def open(self, url: str) -> Shard:
        """See open_shard. A damaged copy is fetched once more: the object itself may be whole."""
        damage: DamagedShardError | None = None
        for _ in range(2):
            path = self._fetch(url)
            try:
                return Shard(str(path), url)
            except FileNotFoundError:
                continue  # another process has just made room
            except DamagedShardError as error:
                damage = error
                path.unlink(missing_ok=True)
        raise damage or DataError(
            f"{self._folder} is too small: the copy of {url} was removed before it was read; free some space "
            "there, or set TMPDIR to a larger disk"
        )

    def _fetch(self, url: str) -> Path:
        """The copy, which is made where it is not there."""
        prefix, _, name = url.rpartition("/")
        place = hashlib.blake2b(prefix.encode(), digest_size=8).hexdigest()
        path = self._folder / place / name
        if _touch(path):
            return path
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        number = int(hashlib.blake2b(name.encode(), digest_size=2).hexdigest(), 16) % _LOCKS
        try:
            with FileLock(self._folder / f".lock-{number}", timeout=_LOCK_WITHIN_S):
                if not _touch(path):  # another process has not fetched it meanwhile
                    data = read_bytes(url)
                    self._make_room(len(data))
                    publish_bytes(path, data)
        except Timeout:
            raise DataError(
                f"{self._folder} was locked by another process for {_LOCK_WITHIN_S:.0f} s, which fetches "
                "shards too; is the object store that slow?"
            ) from None
        return path

    def _make_room(self, size_bytes: int) -> None:
        """Remove the copies that were used longest ago, until one more of this size fits."""
        copies = []
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        limit = min(self._limit_bytes, (total + shutil.disk_usage(self._folder).free) // 2)
        for _, size, path in sorted(copies):
            if total + size_bytes <= limit:
                return
            path.unlink(missing_ok=True)  # who has mapped it keeps it
            total -= size


def _touch(path: Path) -> bool:
    """Whether the file is there; notes that it was used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
