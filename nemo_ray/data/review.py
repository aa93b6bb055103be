"""What became of the rows while they are prepared: counts, the list of rejected ones, and when to stop.

A rejected row cannot be used as it is (no such field, invalid JSON, nothing to train, ...). Rows that
excess_length_strategy drops or cuts are counted and never rejected; blank lines are no rows.
Which windows are missing, and who prepares them, is pipeline.py's and the command's.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ray.data.files import BLANK_LINE
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.statistics import Totals, existing_stats
from nemo_ray.data.window_list import Window
from nemo_ray.errors import DataError
from nemo_ray.storage import publish_bytes, remove
from nemo_ray.urls import is_url
from nemo_ray.visible import visible

EARLY_ROWS = 2_000
EARLY_WINDOWS = 2
EARLY_SHARE = 0.5
"""Where more than this part of so many rows is rejected, the run stops before the whole is known."""

LISTED_ROWS = 100_000
"""Rejected rows that are listed; all are counted."""


@dataclass(frozen=True)
class Prepared:
    """Where preparing is: told after each window."""

    windows: int
    num_windows: int
    new_rows: int
    """Prepared since the start; rows of shards that were there before do not count."""
    new_tokens: int
    rows_left: int


Progress = Callable[[Prepared], None]


Survey = list[tuple[Window, ShardStats | None]]
"""Windows, each once, with what their shards say; None where there is no shard."""


def survey(plan: DataPlan, order: Iterable[int] | None = None) -> Survey:
    """What exists: held-out windows, then plan.windows in `order` (default: as planned)."""
    training = plan.windows if order is None else [plan.windows[index] for index in order]
    windows = list({window.key: window for window in (*plan.eval_windows, *training)}.values())
    return list(zip(windows, existing_stats(plan, windows), strict=True))


def missing_windows(found: Survey) -> list[Window]:
    """The windows without a shard."""
    return [window for window, stats in found if stats is None]


def not_writable(path: str | Path, error: OSError) -> DataError:
    """The error of a prepared directory that takes no files."""
    return DataError(
        f"dataset_prepared_path: {path} cannot be written: {error.strerror or error}; make room there, or "
        "name another folder"
    )


def require_writable(plan: DataPlan) -> None:
    """Raises DataError where the prepared directory takes no files; told before Ray starts, not by a task."""
    if is_url(plan.directory):
        return
    probe = Path(plan.directory) / f".writable-{plan.fingerprint}"
    try:
        publish_bytes(probe, b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise not_writable(plan.directory, error) from None


class Review:
    """Counts what became of the rows, and raises DataError where a run would not train what it is told to."""

    def __init__(
        self,
        plan: DataPlan,
        max_rejected_share: float,
        *,
        listing: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`listing`: where the user finds the rejected rows, beside plan.rejected_path."""
        self._plan = plan
        self._limit = max_rejected_share
        self._listing = listing
        self._progress = progress
        self._windows = {window.key: window for window in (*plan.eval_windows, *plan.windows)}
        self._training = {window.key for window in plan.windows}
        self._num_rows = sum(window.num_rows for window in self._windows.values())
        self._rows_left = self._num_rows
        self._new_windows = self._new_rows = self._new_tokens = 0
        self._totals = Totals()
        self._by_source = [Totals() for _ in plan.sources]
        self._rejected: list[dict[str, Any]] = []

    def add_existing(self, found: Survey) -> None:
        """Count the shards that are there. Raises DataError, as `add` does."""
        for window, stats in found:
            if stats is not None:
                self.add(window, stats, new=False)

    def add(self, window: Window, stats: ShardStats, *, new: bool = True) -> None:
        """Count one shard. Raises DataError when too many rows are rejected."""
        self._totals.add(stats)
        if window.key in self._training:
            self._by_source[window.source].add(stats)
        self._rows_left -= window.num_rows
        if new:
            self._new_windows += 1
            self._new_rows += stats.rows
            self._new_tokens += stats.tokens
        for index, reason, detail in stats.rejected_rows:
            if reason != BLANK_LINE and len(self._rejected) < LISTED_ROWS:
                file, row = self._plan.locate(window, index)
                self._rejected.append({"file": file, "row": row, "reason": reason, "detail": detail})
        self._refuse_if(self._too_many_rejected())
        source = self._by_source[window.source]
        if _is_early_word(source):
            self._refuse_if(self._nothing_to_train(window.source, source))
        if self._progress is not None:
            self._progress(
                Prepared(
                    self._totals.windows,
                    len(self._windows),
                    self._new_rows,
                    self._new_tokens,
                    self._rows_left,
                )
            )

    def finish(self) -> None:
        """Once all windows are counted: list the rejected rows. Raises DataError where nothing is trained."""
        self.write_rejected()
        for source, totals in enumerate(self._by_source):
            if totals.windows:
                self._refuse_if(self._nothing_to_train(source, totals))

    def write_rejected(self) -> None:
        """List the rejected rows, one JSON object a line; no file where there are none."""
        entries = sorted(self._rejected, key=lambda entry: (entry["file"], entry["row"]))
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        # Shards that were there before may lie where nothing can be written, and were listed then.
        places = [self._plan.rejected_path] if self._new_windows else []
        for path in [*places, *([str(self._listing)] if self._listing is not None else [])]:
            try:
                if entries:
                    publish_bytes(path, text.encode("utf-8", "backslashreplace"))
                else:
                    remove(path)
            except OSError as error:
                raise DataError(f"{path} cannot be written: {error.strerror or error}") from None

    # -- what is wrong ----------------------------------------------------------------------------

    def _refuse_if(self, complaint: str | None) -> None:
        if complaint is not None:
            self.write_rejected()
            raise DataError(visible(complaint))

    def _too_many_rejected(self) -> str | None:
        totals, rejected = self._totals, self._totals.num_rejected
        limit = f"max_rejected_share {self._limit:.4g}"
        if rejected > self._limit * self._num_rows:
            return self._complaint(f"more than {limit} of all {self._num_rows:,}")
        if self._limit < EARLY_SHARE and _is_early_word(totals) and rejected > EARLY_SHARE * totals.rows:
            return self._complaint(f"more than half, with {limit}")
        return None

    def _complaint(self, limit: str) -> str:
        totals, place = self._totals, self._listing or self._plan.rejected_path
        reason, count = totals.reasons()[0]
        examples = [entry for entry in self._rejected if entry["reason"] == reason]
        rows = ", ".join(f"{entry['file']} row {entry['row']}" for entry in examples[:3])
        return (
            f"datasets: {totals.num_rejected:,} of the {totals.rows:,} rows prepared so far were rejected, "
            f"{limit}; most often ({count:,}): {reason} ({rows}). They are listed in {place}; correct them, "
            "or raise max_rejected_share"
        )

    def _nothing_to_train(self, source: int, totals: Totals) -> str | None:
        name = self._plan.sources[source].name
        if not totals.documents:
            return f"datasets: none of {totals.rows:,} rows of {name} can be trained on: {self._why(totals)}"
        if not totals.targets:
            return (
                f"datasets: none of the {totals.tokens:,} tokens of {totals.rows:,} rows of {name} is "
                "trained; `python -m nemo_ray.data CONFIG --show 3` shows which tokens are targets"
            )
        return None

    def _why(self, totals: Totals) -> str:
        """Why rows gave no document, with the remedy."""
        length = self._plan.sequence_len
        parts = [f"{count:,} were rejected ({reason})" for reason, count in totals.reasons()]
        if not totals.dropped:
            return ", ".join(parts) or "they are blank lines"
        every = "every row is" if totals.dropped == totals.rows else f"{totals.dropped:,} are"
        return (
            ", ".join(
                [f"{every} longer than sequence_len {length} (or cut, with nothing to train left)", *parts]
            )
            + "; raise sequence_len, or set excess_length_strategy: truncate where answers begin early"
        )


def _is_early_word(totals: Totals) -> bool:
    """Whether these rows are enough to speak for the rest."""
    return totals.windows >= EARLY_WINDOWS and totals.rows >= EARLY_ROWS
