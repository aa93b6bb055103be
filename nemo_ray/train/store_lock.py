"""One driver at a time in a run's folder of an object store: how it is claimed, kept, taken over, and lost.

The object `.driver.json` names the holder and counts its beats. A holder is dead if its process is gone, or,
where that cannot be seen from here, if the object's content stands still. Stores offer neither locks nor puts
that depend on what is there, but they show at once what was put. So it is Fischer's algorithm: look, put the
own name, wait for `settle_s`, look again; whoever is named then has won. Of two claims exactly one wins, if
look and put take no longer than `settle_s` together: that is measured, and a slower claim puts again.
A holder looks before each beat, and has lost for good once it sees another name, or none.

Where two may believe that they hold the folder, and for how long:
- A holder that was taken for dead while it was frozen or cut off: from its return to its next look, which is
  a request later; a beat later on a machine whose clock stood still meanwhile.
- A beat's put that was sent before the folder was taken over, and arrives after the new holder has settled:
  that one loses at its next beat, and the old one goes on. A late delete of `release` ends the new one, too.
- A claim's put that takes longer than `settle_s` may replace the name of one who has settled: the claim waits
  until that one has had its next beat, and lost.
- A put that the store carries out after the client has given it up: until the next beats.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from nemo_ray import storage
from nemo_ray.errors import ConfigError
from nemo_ray.object_store import connect
from nemo_ray.train.driver import UNREADABLE, Driver, process_lives, refusal, require, this_driver
from nemo_ray.train.driver_lock import FILE_NAME
from nemo_ray.urls import parse, redact

BEAT_S = 10.0
WATCH_S = 40.0
"""Four beats of a holder on another machine."""
SETTLE_S = 2.0
_LOOKS = 20
"""In the time of a watch."""
_SLOW_PUTS = 3
"""After which a claim gives up."""
_DELETE_PAUSES_S = (0.0, 0.3, 1.0)
"""Before each attempt of a release to delete the object."""
_SIZE_BYTES = 1024
"""Of every content. pyarrow 26 asks for the size first, then for that much of what may be another by then."""


class StoreLock:
    """This process's hold on one folder of a store. Creating the object makes no request."""

    def __init__(
        self,
        url: str,
        submission_id: str | None,
        say: Callable[[str], None],
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.path = storage.join(url, FILE_NAME)
        self.me = this_driver(submission_id)
        self._folder, self._say = redact(url), say
        self._beat_s, self._watch_s, self._settle_s = beat_s, watch_s, settle_s
        self._seen: Driver | None = None
        self._num_puts = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store-lock", daemon=True)

    def claim(self) -> None:
        """Hold the folder until `release`. Takes `settle_s` at least; a refusal leaves no trace.

        Raises: ConfigError where another driver holds it, or the store refuses, or is too slow.
        """
        try:
            self._take()
        except OSError as error:
            raise ConfigError(f"output_dir: {error}") from error
        self._seen = self.me
        self._thread.start()

    def holds(self) -> bool:
        """Whether the folder was ours when last seen; yes, too, while the store does not answer."""
        return self._seen == self.me

    def check(self) -> None:
        """Raises NemoRayError where the folder was seen to be ours no longer. Makes no request."""
        require(self._folder, FILE_NAME, self._seen, self.me)

    def release(self) -> None:
        """Give up what is ours. A store that does not answer is not waited for."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(self._beat_s)
        # Else a put under way would come after the delete. Who finds the object sees that we are gone.
        if self._num_puts and not self._thread.is_alive():
            began_s = time.monotonic()
            for pause_s in _DELETE_PAUSES_S:
                time.sleep(pause_s)
                if time.monotonic() - began_s > self._beat_s:
                    break
                with contextlib.suppress(OSError):
                    self._delete()
                    break
        self._seen = None

    def _take(self) -> None:
        """Make the object name us, and stay so."""
        free: bytes | None = None  # what may be replaced
        num_slow = 0
        while True:
            began_s = time.monotonic()
            content = _read(self.path)
            holder = _named(content)
            if holder is not None and holder != self.me and content != free:
                if not self._lives(content, holder):
                    free = content
                elif _named(_read(self.path)) == holder:
                    raise refusal(self._folder, holder)
                continue
            free = self._content()
            storage.publish_bytes(self.path, free)
            took_s = time.monotonic() - began_s
            slow = took_s > self._settle_s
            # A slow put may have come over the name of one who has settled: it is given time to see that.
            time.sleep(self._watch_s if slow else self._settle_s)
            holder = _named(_read(self.path))
            if holder is not None and holder != self.me:
                raise refusal(self._folder, holder)
            if holder is not None and not slow:
                return
            num_slow += slow
            if num_slow == _SLOW_PUTS:
                raise ConfigError(
                    f"output_dir: {self._folder} cannot be held: the store took {took_s:.1f} s to read and "
                    f"write a small object, longer than {self._settle_s:g} s; start again when it is faster"
                )

    def _lives(self, content: bytes | None, holder: Driver) -> bool:
        """Whether the holder is alive: by its process where it can be seen, else by its beats."""
        lives = process_lives(holder)
        if lives is not None:
            return lives
        self._say(f"waiting to see whether another driver is alive in {self._folder}: {holder}")
        num_looks = 0
        while num_looks < _LOOKS:  # not until a time: this process may be frozen too
            time.sleep(self._watch_s / _LOOKS)
            began_s = time.monotonic()
            if _read(self.path) != content:
                return True
            # A store that was away for us may have been away for the holder: it may beat again now.
            num_looks = num_looks + 1 if time.monotonic() - began_s < self._beat_s else 0
        return False

    def _beat(self) -> None:
        while not self._released.is_set():
            # Of whatever kind: a thread that ended would leave us sure of a folder that another takes.
            with contextlib.suppress(Exception):
                began_s = time.monotonic()
                seen = _named(_read(self.path))
                if seen != self.me:
                    self._seen = seen
                    return
                if time.monotonic() - began_s > self._beat_s:  # frozen meanwhile, or the store was away
                    continue
                _put_once(self.path, self._content())
            self._released.wait(self._beat_s)

    def _content(self) -> bytes:
        """Our name, in words that were never put before."""
        self._num_puts += 1
        text = json.dumps({**asdict(self.me), "beats": self._num_puts}, indent=2)
        return text.encode().ljust(_SIZE_BYTES - 1) + b"\n"

    def _delete(self) -> None:
        location = parse(self.path)
        system = connect(location)
        with contextlib.suppress(FileNotFoundError):  # an earlier delete's reply was lost
            with system.open_input_file(location.inner) as file:
                content = bytes(file.read())
            if _named(content) == self.me:
                system.delete_file(location.inner)


def read_holder(url: str) -> Driver | None:
    """Who is named in a folder, alive or dead, by a look of its own; None where nobody is. Raises OSError."""
    return _named(_read(storage.join(url, FILE_NAME)))


def _read(path: str) -> bytes | None:
    """The object's content; None where there is none. Raises OSError."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


def _named(content: bytes | None) -> Driver | None:
    """Whom the object names; None where there is none."""
    if content is None:
        return None
    try:
        facts = json.loads(content)
        del facts["beats"]
        return Driver(**facts)
    except (ValueError, TypeError, KeyError):
        return UNREADABLE


def _put_once(path: str, data: bytes) -> None:
    """Without the patience of storage.py, in which another may have taken the folder. Raises OSError."""
    location = parse(path)
    stream = connect(location).open_output_stream(location.inner, compression=None)
    stream.write(data)  # no `with`: at an error it would put what was written so far
    stream.close()
