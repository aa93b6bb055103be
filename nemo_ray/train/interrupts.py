"""Ctrl-C and SIGTERM: the first asks for an end, the second ends at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 130
_END_WITHIN_S = 5.0
_ECHO_S = 1.0
"""Within which a SIGTERM is the one before: `timeout` sends it to the process, and then to its group."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Counts signals in the main thread. Until `collect`, the first raises KeyboardInterrupt on the spot."""

    def __init__(self, end_now: Callable[[], None]) -> None:
        """`end_now` releases what must not be left behind; it is given a few seconds."""
        self.count = 0
        self._end_now = end_now
        self._collecting = False
        self._terminated_s = -_ECHO_S
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in _SIGNALS:
            self._previous[number] = signal.getsignal(number)
        self.install()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, again where another (ray.init takes SIGTERM) took them since."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def collect(self) -> None:
        """From here on the first signal is only counted: the main loop asks for `count`."""
        self.install()
        self._collecting = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            before_s, self._terminated_s = self._terminated_s, time.monotonic()
            if self._terminated_s - before_s < _ECHO_S:
                return
        self.count += 1
        if self.count > 2:
            os._exit(EXIT_CODE)
        if self.count == 2:
            self._end()
        if not self._collecting:
            raise KeyboardInterrupt

    def _end(self) -> None:
        """Leave the process now. Ray's own reaper ends what a local Ray may still have running."""
        os.write(2, b"stopped at once: nothing more was saved\n")
        ender = threading.Thread(target=self._end_now, daemon=True)
        ender.start()
        ender.join(_END_WITHIN_S)
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # a live line hides the cursor
        os._exit(EXIT_CODE)
