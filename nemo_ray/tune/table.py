"""A sweep in the terminal: a table that lives on a terminal, a line for each change in a log file."""

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_ray.config.translate import show
from nemo_ray.train.progress import duration
from nemo_ray.tune.course import Course
from nemo_ray.tune.space import Point
from nemo_ray.tune.trial import FINISHED

_COLUMNS = ("trial", "parameters", "state", "step", "loss", "value", "tokens/s", "ETA")


def describe(point: Point) -> str:
    """lora_r=16, learning_rate=2.1e-04"""
    return ", ".join(f"{name}={_short(value)}" for name, value in point.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else show(value)


class SweepDisplay:
    """Call `poll` a few times a second. Context manager: the live table goes away at its end."""

    def __init__(self, console: Console, course: Course, points: dict[int, Point]) -> None:
        self._console, self._course, self._points = console, course, points
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._said_running: set[int] = set()
        self._said_ended: set[int] = set(course.ends)

    def __enter__(self) -> "SweepDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(Text(text), soft_wrap=True)

    def poll(self) -> None:
        """Tell what is new, and draw the table."""
        course = self._course
        for number, end in sorted(course.ends.items()):
            if number in self._said_ended:
                continue
            self._said_ended.add(number)
            at = f" with {course.metric} {end.value:.4f}" if end.status == FINISHED and end.value else ""
            self.say(f"trial {number} {end.status}{at}{f': {end.reason}' if end.reason else ''}")
        for number in sorted(course.running - self._said_running):
            self._said_running.add(number)
            self.say(f"trial {number}: {describe(self._points.get(number, {}))}")
        if self._live is not None:
            self._live.update(table(course, self._points), refresh=True)


def table(course: Course, points: dict[int, Point]) -> Table:
    """All trials that have begun, and how many have not."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name in _COLUMNS:
        drawn.add_column(
            name if name != "value" else course.metric,
            justify="left" if name in ("parameters", "state") else "right",
            overflow="ellipsis",
            no_wrap=True,
        )
    best, waiting = course.best(), 0
    for number in course.numbers:
        end, running = course.ends.get(number), number in course.running
        if end is None and not running and course.value(number) is None:
            waiting += 1
            continue
        progress = course.run(number).read_progress() if running else {}
        value = course.value(number)
        state = "broken off" if course.closed else "waiting"
        state = end.status if end else "running" if running else state
        known: dict[str, Any] = progress if running else {"step": end.step if end else None}
        cells = (
            str(number),
            describe(points.get(number, {})),
            f"{state}, best" if number == best else state,
            "" if known.get("step") is None else str(known["step"]),
            f"{known['loss']:.4f}" if known.get("loss") is not None else "",
            f"{value:.4f}" if value is not None else "",
            f"{known['tokens_per_s']:,.0f}" if known.get("tokens_per_s") else "",
            duration(known["eta_s"]) if known.get("eta_s") is not None else "",
        )
        drawn.add_row(*(Text(cell) for cell in cells), style="bold" if number == best else "")
    if waiting:
        drawn.add_row("", f"{waiting} more have not begun", style="dim")
    return drawn
