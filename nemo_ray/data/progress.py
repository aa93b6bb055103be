"""How far preparing is: one live line on a terminal, about ten lines in a log."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nemo_ray.data.charts import number
from nemo_ray.data.review import Prepared

_LINES = 10


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def status_line(now: Prepared, elapsed_s: float) -> str:
    """Windows, speed, and how long it will take; speeds are left out until there is one."""
    parts = [f"{now.windows:,}/{now.num_windows:,} windows"]
    if now.new_rows and elapsed_s > 0:
        parts.append(f"{number(now.new_rows / elapsed_s)} rows/s")
        parts.append(f"{number(now.new_tokens / elapsed_s)} tokens/s")
        if now.rows_left:
            parts.append(f"ETA {duration(now.rows_left * elapsed_s / now.new_rows)}")
    return "  ".join(parts)


class PrepareDisplay:
    """`tell` may be called by any thread, `draw` by the main one, a few times a second."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._began_s = clock()
        self._now: Prepared | None = None
        self._printed = 0

    def __enter__(self) -> "PrepareDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self) -> None:
        """Ray is up: speeds are counted from here."""
        self._began_s = self._clock()

    @property
    def now(self) -> Prepared | None:
        """What was told last."""
        return self._now

    def tell(self, now: Prepared) -> None:
        """A window is ready."""
        self._now = now
        if self._live is None:
            self._print(now)

    def draw(self) -> None:
        """Repaint the live line."""
        if self._live is not None:
            line = "starting Ray" if self._now is None else f"preparing  {self._line(self._now)}"
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _line(self, now: Prepared) -> str:
        return status_line(now, self._clock() - self._began_s)

    def _print(self, now: Prepared) -> None:
        """A line for each tenth of the windows; none for those that were there before."""
        tenth = now.windows * _LINES // max(now.num_windows, 1)
        if now.new_rows and tenth > self._printed:
            self._printed = tenth
            self._console.print(Text(self._line(now)), soft_wrap=True)
