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


class Speed:
    """Rows and tokens a second, from the first new shard on: Ray Data's own start is no part of it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, Prepared] | None = None

    def status_line(self, now: Prepared) -> str:
        """Windows, speed, and how long it will take; call it once a shard. Speeds need two new shards."""
        parts = [f"{now.windows:,}/{now.num_windows:,} windows"]
        if self._first is None:
            if now.new_rows:
                self._first = self._clock(), now
            return parts[0]
        began_s, first = self._first
        elapsed_s, rows = self._clock() - began_s, now.new_rows - first.new_rows
        if rows > 0 and elapsed_s > 0:
            parts.append(f"{number(rows / elapsed_s)} rows/s")
            parts.append(f"{number((now.new_tokens - first.new_tokens) / elapsed_s)} tokens/s")
            if now.rows_left:
                parts.append(f"ETA {duration(now.rows_left * elapsed_s / rows)}")
        return "  ".join(parts)


class PrepareDisplay:
    """`tell` may be called by any thread, `draw` by the main one, a few times a second."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._speed = Speed(clock)
        self._line = ""
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._now: Prepared | None = None
        self._printed = 0

    def __enter__(self) -> "PrepareDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def now(self) -> Prepared | None:
        """What was told last."""
        return self._now

    def tell(self, now: Prepared) -> None:
        """A window is ready."""
        self._now, self._line = now, self._speed.status_line(now)
        tenth = now.windows * _LINES // max(now.num_windows, 1)
        if self._live is None and now.new_rows and tenth > self._printed:  # nothing of shards that were there
            self._printed = tenth
            self._console.print(Text(self._line), soft_wrap=True)

    def draw(self) -> None:
        """Repaint the live line."""
        if self._live is not None:
            line = f"preparing  {self._line}" if self._line else "starting Ray"
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
