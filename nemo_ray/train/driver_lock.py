"""One driver at a time in a run's directory: how it is claimed, kept, taken from a dead driver, and lost.

`.driver.json` names the holder, who touches it every few seconds. A holder is dead if its process is gone, or
if its file stands still, where its process cannot be seen from here. The file's time is compared with itself
only, so clocks that jump or differ do not matter. Locks of file systems are not used: on many network file
systems they do nothing.
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from nemo_ray.errors import ConfigError
from nemo_ray.storage import publish_bytes
from nemo_ray.train.driver import UNREADABLE, Driver, process_lives, refusal, require, this_driver

FILE_NAME = ".driver.json"
BEAT_S = 3.0
WATCH_S = 10.0
"""Three beats of a holder on another machine."""
_POLL_S = 0.2
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer."""


class DriverLock:
    """This process's hold on one folder. Creating the object touches nothing on disk."""

    def __init__(
        self,
        folder: Path,
        submission_id: str | None,
        say: Callable[[str], None],
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
    ) -> None:
        self.folder, self.path = folder, folder / FILE_NAME
        self.me = this_driver(submission_id)
        self._say, self._beat_s, self._watch_s = say, beat_s, watch_s
        self._made: list[Path] = []
        self._released = threading.Event()

    def claim(self) -> None:
        """Hold the folder until `release`; it is made where there is none. A refusal leaves no trace.

        Raises: ConfigError where another driver holds it, or it cannot be written.
        """
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"output_dir: {self.folder} is a file; name a folder")
            self._take(self.path)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.folder} cannot be written ({error.strerror}); make room, or name a "
                "folder that takes files from you"
            ) from error
        threading.Thread(target=self._beat, name="driver-lock", daemon=True).start()

    def holds(self) -> bool:
        """Whether the folder is ours; no, too, where that cannot be read."""
        with contextlib.suppress(OSError):
            return _read(self.path) == self.me
        return False

    def check(self) -> None:
        """Raises NemoRayError where the folder is ours no longer: we were taken for dead. Or OSError."""
        require(str(self.folder), FILE_NAME, _read(self.path), self.me)

    def release(self) -> None:
        """Give up what is ours, and a folder that `claim` made and nobody used."""
        self._released.set()
        with contextlib.suppress(OSError):  # whoever finds the file will see that this process is gone
            if self.holds():
                self.path.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is used
                folder.rmdir()

    def _beat(self) -> None:
        while not self._released.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a hiccup of the file system: the next beat may be heard
                if _read(self.path) != self.me:
                    return
                os.utime(self.path)

    def _take(self, path: Path) -> None:
        """Make `path` ours. A dead driver's file is replaced by whoever holds, in the same way, the file that
        is named after that driver: by one at a time, who looks again first."""
        while True:
            holder = _read(path)
            if holder is None:
                if self._create(path):
                    return
            elif holder == self.me:  # a network file system that asked twice tells of our link as another's
                return
            elif self._lives(path, holder):
                if _read(path) == holder:
                    raise refusal(str(self.folder), holder)
            else:
                turn = path.with_name(f".driver-{holder.token}.json")
                self._take(turn)
                try:
                    if _read(path) == holder:
                        publish_bytes(path, self._identity())
                        return
                finally:
                    turn.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Make the file, whole from its first moment; False where there is one."""
        self._made += [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{self.me.token}.partial")
        try:
            aside.write_bytes(self._identity())
            try:
                os.link(aside, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                with open(path, "xb") as file:
                    file.write(self._identity())
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _identity(self) -> bytes:
        return json.dumps(asdict(self.me), indent=2).encode() + b"\n"

    def _lives(self, path: Path, holder: Driver) -> bool:
        """Whether the holder is alive: by its process where it can be seen, else by its heartbeat."""
        lives = process_lives(holder)
        if lives is not None:
            return lives
        self._say(f"waiting to see whether another driver is alive in {self.folder}: {holder}")
        before = _changed_ns(path)
        for _ in range(round(self._watch_s / _POLL_S)):  # not until a time: this process may be frozen too
            time.sleep(_POLL_S)
            if _changed_ns(path) != before or _read(path) != holder:
                return True
        return False


@contextlib.contextmanager
def only_while_held(folder: Path, driver: Driver) -> Iterator[None]:
    """For a worker of `driver`: its process ends when that one no longer holds the folder. A driver that is
    frozen cannot end its workers, and they would write beside those of the one that took over.

    Raises: NemoRayError where it is so from the start.
    """
    path, left = folder / FILE_NAME, threading.Event()

    def watch() -> None:
        while not left.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a hiccup of the file system
                if _read(path) != driver:
                    os._exit(1)

    require(str(folder), FILE_NAME, _read(path), driver)
    threading.Thread(target=watch, name="driver-lock", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def read_holder(folder: Path) -> Driver | None:
    """Who is named in a folder, alive or dead; None where nobody is. Raises OSError."""
    return _read(folder / FILE_NAME)


def _read(path: Path) -> Driver | None:
    """Who is named there; None where there is no file. Raises OSError."""
    try:
        return Driver(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return UNREADABLE


def _changed_ns(path: Path) -> int | None:
    """When the file was last touched; None where it is gone. Opened, since NFS answers stat from a cache."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
