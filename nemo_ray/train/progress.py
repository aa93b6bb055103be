"""What the user sees while a run is under way: one live line on a terminal, calm plain lines elsewhere.

It reads the run directory, which rank 0 writes; it owns how that is worded and how often.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nemo_ray.run_dir import RunDir, step_of

PLAIN_INTERVAL_S = 10.0
_SLOW_POLL_S = 1.0
_PHASES = {
    "loading": "loading the model",
    "compiling": "compiling kernels, which takes a minute the first time on a machine",
    "self-test": "checking the model",
    "completing": "completing the prompts",
    "evaluating": "evaluating held-out rows",
    "training": "training",
    "saving": "saving a checkpoint",
    "exporting": "writing the result",
    "done": "",
}
_ROW_FIGURES = ("step", "loss", "lr", "tokens_per_s")
BEFORE_TRAINING = ("loading", "compiling", "self-test")
"""Phases before the first evaluation."""


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def status_line(figures: Mapping[str, Any]) -> str:
    """One line from the newest figures; those that are not known yet are left out."""
    known = {name: value for name, value in figures.items() if value is not None}
    phase = known.get("phase", "")
    parts = [] if phase == "training" and "loss" in known else [_PHASES.get(phase, phase)]
    if known.get("step"):
        total = f"/{known['max_steps']}" if "max_steps" in known else ""
        share = f" ({known['progress']:.0%})" if "progress" in known and not total else ""
        parts.append(f"step {known['step']}{total}{share}")
    if "loss" in known:
        parts.append(f"loss {known['loss']:.4f}")
    if "eval_loss" in known:
        parts.append(f"held-out {known['eval_loss']:.4f}")
    if "lr" in known:
        parts.append(f"lr {known['lr']:.2e}")
    if "tokens_per_s" in known:
        parts.append(f"{known['tokens_per_s']:,.0f} tokens/s")
    if known.get("windows_total", 0) > known.get("windows_done", 0):
        parts.append(f"data {known['windows_done']}/{known['windows_total']} windows")
    if "eta_s" in known and phase != "done":
        parts.append(f"ETA {duration(known['eta_s'])}")
    return "  ".join(part for part in parts if part)


def by_dataset(row: Mapping[str, Any]) -> str:
    """The losses of an evaluation row by dataset, in brackets; nothing where there is one only."""
    losses = {name: own["loss"] for name, own in row.get("eval_datasets", {}).items()}
    if len(losses) < 2:
        return ""
    return f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items() if loss is not None)})"


def _key(row: Mapping[str, Any]) -> tuple[int, bool]:
    return row["step"], "eval_loss" in row


class MetricsTail:
    """New rows of a metrics.jsonl that grows, and is rewritten when a run goes back to a checkpoint."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.metrics_file
        self._file: tuple[int, int] = (0, 0)
        self._offset = 0
        self._seen: set[tuple[int, bool]] = set()

    def skip(self, step: int) -> None:
        """Rows up to `step` are old news: a continued run wrote them before."""
        self._seen = {key for row in self.new_rows() if (key := _key(row))[0] <= step}

    def new_rows(self) -> list[dict[str, Any]]:
        """Complete rows since the last call; a step that is trained again is not told again."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return []
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
            self._file, self._offset = (status.st_dev, status.st_ino), 0
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = []
        for line in complete.splitlines():
            row = json.loads(line)
            if _key(row) not in self._seen:
                self._seen.add(_key(row))
                rows.append(row)
        return rows


def _step_of_newest_checkpoint(run: RunDir) -> int:
    newest = run.newest_checkpoint()
    return step_of(newest) if newest is not None else -1


class ProgressDisplay:
    """Call `poll` a few times a second. Context manager: the live line goes away at its end."""

    def __init__(
        self, console: Console, run: RunDir, *, live: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._run, self._clock = console, run, clock
        self._live = Live(Text(""), console=console, auto_refresh=False, transient=True) if live else None
        self._figures: dict[str, Any] = {}
        self._tail = MetricsTail(run)
        self._tail.skip(_step_of_newest_checkpoint(run))
        self._checkpoints = {path.name for path in run.complete_checkpoints()}
        self._model_shown = False
        self._failures_told, self._restart_told = 0, False
        self._notices: set[str] = set()
        self._line_at_s = self._looked_at_s = -float("inf")
        self._last_line = ""
        self._began_s = clock()

    def __enter__(self) -> "ProgressDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def nothing_to_save(self) -> bool:
        """Whether an end now loses nothing: training has not begun."""
        figures = self._figures
        before_the_first_step = self.phase in ("completing", "evaluating") and figures.get("step") == 0
        return self.phase in (None, *BEFORE_TRAINING) or before_the_first_step

    @property
    def phase(self) -> str | None:
        """Where the workers are; None until they say it."""
        phase = self._figures.get("phase")
        return phase if phase in _PHASES else None

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self._console.print(Text(text), soft_wrap=True)

    def stage(self, text: str) -> None:
        """What the driver is doing before the workers speak."""
        self._figures["phase"] = text
        self._draw()

    def data(self, done: int, total: int) -> None:
        """Windows prepared so far; any thread may call it."""
        self._figures |= {"windows_done": done, "windows_total": total}

    def poll(self) -> None:
        """Read the run directory and tell what is new."""
        self._tell_failures()
        progress = self._run.read_progress()
        if progress:
            before = self.phase
            self._figures |= {name: value for name, value in progress.items() if value is not None}
            if self.phase in BEFORE_TRAINING and before not in (None, *BEFORE_TRAINING):
                if not self._restart_told:
                    self._tell_restart()
                self._restart_told = False
            self._tell_model()
        for row in self._tail.new_rows():
            if "eval_loss" in row:
                self.say(f"held-out loss {row['eval_loss']:.4f} at step {row['step']}{by_dataset(row)}")
            else:  # written at every logged step, where progress.json may skip some
                self._figures |= {name: row[name] for name in _ROW_FIGURES if name in row}
        if self._clock() - self._looked_at_s >= _SLOW_POLL_S or self.phase == "done":
            self._looked_at_s = self._clock()
            self._tell_checkpoints()
            if self._model_shown:  # a tracker may have failed since
                self._tell_notices(self._run.read_run())
        self._draw()

    def _tell_failures(self) -> None:
        """Why workers are started again, as soon as it is known."""
        failures = self._run.read_failures()
        for failure in failures[self._failures_told :]:
            if failure["restart"]:  # the others end the run, and its last line is theirs
                self._tell_restart(failure["line"])
                self._restart_told = True
        self._failures_told = len(failures)

    def _tell_restart(self, why: str = "a worker was lost") -> None:
        newest = self._run.newest_checkpoint()
        self.say(f"{why}: starting again from {newest.name if newest is not None else 'the beginning'}")

    def _tell_model(self) -> None:
        if self._model_shown:
            return
        facts = self._run.read_run()
        if model := facts.get("model"):
            self._model_shown = True
            share = model["trainable"] / max(1, model["total"])
            self.say(
                f"model: {model['total']:,} parameters, {model['trainable']:,} of them trained ({share:.2%})"
            )
            self._tell_notices(facts)

    def _tell_notices(self, facts: Mapping[str, Any]) -> None:
        for notice in facts.get("notices", ()):
            if notice not in self._notices:
                self._notices.add(notice)
                self.say(f"note: {notice}")

    def _tell_checkpoints(self) -> None:
        for path in self._run.complete_checkpoints():
            if path.name not in self._checkpoints:
                self._checkpoints.add(path.name)
                self.say(f"checkpoint {path.name}")

    def _draw(self) -> None:
        line = status_line(self._figures)
        if self._live is not None:
            waited = "" if self.phase else f"  ({duration(self._clock() - self._began_s)})"
            self._live.update(Text(line + waited, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        phase = self._figures.get("phase")
        if phase == "training":
            due = self._clock() - self._line_at_s >= PLAIN_INTERVAL_S
            if due and "loss" in self._figures and line != self._last_line:
                self._line_at_s = self._clock()
                self._print_plain(line)
        elif phase and phase not in ("evaluating", "saving"):
            words = line if phase == "done" else _PHASES.get(phase, phase)
            if words != self._last_line:
                self._print_plain(words)

    def _print_plain(self, line: str) -> None:
        self._last_line = line
        self.say(line)
