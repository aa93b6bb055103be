"""What became of the rows: sums over the shards that exist, and their text for the user."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_ray.data import histograms
from nemo_ray.data.files import BLANK_LINE
from nemo_ray.data.histograms import Histograms
from nemo_ray.data.manifest import DataPlan, shard_name
from nemo_ray.data.shards import DamagedShardError, ShardStats, read_stats
from nemo_ray.data.window_list import Window, WindowList
from nemo_ray.storage import list_names
from nemo_ray.urls import is_url
from nemo_ray.visible import visible

_EXAMPLES_OF_A_REASON = 3

_REQUESTS_AT_ONCE = 32


class Totals:
    """A running sum of shards' statistics."""

    def __init__(self) -> None:
        self.windows = self.rows = self.documents = self.packs = self.tokens = 0
        self.targets = self.dropped = self.truncated = 0
        self.rejected: Counter[str] = Counter()
        self.histograms: Histograms = {}

    def add(self, more: "ShardStats | Totals") -> None:
        """Count one shard, or all that another sum has counted."""
        self.windows += more.windows if isinstance(more, Totals) else 1
        self.rows += more.rows
        self.documents += more.documents
        self.packs += more.packs
        self.tokens += more.tokens
        self.targets += more.targets
        self.dropped += more.dropped
        self.truncated += more.truncated
        self.rejected.update(more.rejected)
        histograms.add(self.histograms, more.histograms)

    @property
    def num_rejected(self) -> int:
        """Rows that could not be used; blank lines are no rows."""
        return sum(count for reason, count in self.rejected.items() if reason != BLANK_LINE)

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, rows) of rejected rows, the most frequent first."""
        return [(reason, count) for reason, count in self.rejected.most_common() if reason != BLANK_LINE]

    def to_json(self, sequence_len: int) -> dict[str, Any]:
        """A JSON-ready dict; `efficiency` is the share of positions that hold a token, None without packs."""
        return {
            "prepared_windows": self.windows,
            "rows": self.rows,
            "documents": self.documents,
            "packs": self.packs,
            "tokens": self.tokens,
            "targets": self.targets,
            "dropped": self.dropped,
            "truncated": self.truncated,
            "rejected": dict(self.reasons()),
            "blank_lines": self.rejected[BLANK_LINE],
            "efficiency": self.tokens / (self.packs * sequence_len) if self.packs else None,
            "histograms": self.histograms,
        }


def sum_of(parts: Iterable[ShardStats | Totals]) -> Totals:
    """The sum of shards' statistics."""
    totals = Totals()
    for part in parts:
        totals.add(part)
    return totals


def sum_shards(plan: DataPlan, windows: Iterable[Window]) -> Totals:
    """The sum over those windows whose shards exist."""
    totals = Totals()
    for stats in existing_stats(plan, list(windows)):
        if stats is not None:
            totals.add(stats)
    return totals


def existing_stats(plan: DataPlan, windows: Sequence[Window]) -> Iterator[ShardStats | None]:
    """The statistics of each window's shard; None where there is none, or where it is visibly damaged."""
    present = list_names(plan.directory) if windows else set()

    def stats(window: Window) -> ShardStats | None:
        if shard_name(window) not in present:
            return None
        try:
            return read_stats(plan.shard_path(window))
        except (FileNotFoundError, DamagedShardError):
            return None

    if not is_url(plan.directory):
        yield from map(stats, windows)
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        yield from pool.map(stats, windows)


def data_statistics(plan: DataPlan) -> dict[str, Any]:
    """JSON-ready: the sources, what is estimated before anything is prepared, and sums over what exists."""
    train, examples = _by_source(plan, plan.windows)
    held_out, more = _by_source(plan, plan.eval_windows)
    return {
        "sequence_len": plan.sequence_len,
        "sources": [
            {
                "name": source.name,
                "type": source.type,
                "files": len(source.files),
                "rows": source.num_rows,
                "held_out_rows": source.held_out_rows,
                "tokens_per_row": round(source.tokens_per_row, 1),
                "evaluation_only": source.evaluation_only,
                "train": train[number].to_json(plan.sequence_len),
                "held_out": held_out[number].to_json(plan.sequence_len),
            }
            for number, source in enumerate(plan.sources)
        ],
        "train": _part(plan, plan.windows, train),
        "held_out": _part(plan, plan.eval_windows, held_out),
        "rejected_examples": [*examples, *more],
    }


def _by_source(plan: DataPlan, windows: Sequence[Window]) -> tuple[list[Totals], list[dict[str, Any]]]:
    """The sums of each source, and the first rejected rows of each reason."""
    totals = [Totals() for _ in plan.sources]
    examples: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for window, stats in zip(windows, existing_stats(plan, windows), strict=True):
        if stats is not None:
            totals[window.source].add(stats)
            for index, reason, detail in stats.rejected_rows:
                if reason != BLANK_LINE and seen[reason] < _EXAMPLES_OF_A_REASON:
                    seen[reason] += 1
                    file, row = plan.locate(window, index)
                    examples.append({"file": file, "row": row, "reason": reason, "detail": detail})
    return totals, examples


def _part(plan: DataPlan, windows: WindowList, sources: Sequence[Totals]) -> dict[str, Any]:
    return {
        "windows": len(windows),
        "planned_rows": int(windows.num_rows.sum()),
        "estimated_tokens": round(plan.estimated_tokens(windows)),
        **sum_of(sources).to_json(plan.sequence_len),
    }


# -- in words -------------------------------------------------------------------------------------


def describe(statistics: dict[str, Any]) -> list[str]:
    """The statistics as lines of text."""
    lines = [
        f"{source['name']}: {source['rows']:,} rows ({source['held_out_rows']:,} held out) in "
        f"{source['files']} file{'' if source['files'] == 1 else 's'}, "
        f"about {source['tokens_per_row']:,.0f} tokens a row"
        for source in statistics["sources"]
    ]
    for name, part in (("train", statistics["train"]), ("held out", statistics["held_out"])):
        if part["windows"]:
            lines.append(f"{name}: {_describe_part(part)}")
            lines += [f"  rejected: {count:,} rows, {reason}" for reason, count in part["rejected"].items()]
            if part["blank_lines"]:
                lines.append(f"  skipped: {part['blank_lines']:,} blank lines")
    return [visible(line) for line in lines]


def _describe_part(part: dict[str, Any]) -> str:
    if not part["prepared_windows"]:
        return f"{part['planned_rows']:,} rows, about {part['estimated_tokens']:,} tokens, not prepared yet"
    text = f"{part['documents']:,} documents, {part['tokens']:,} tokens, {part['packs']:,} packs"
    if part["packs"]:
        trained = part["targets"] / part["tokens"]
        text += f", {part['efficiency']:.1%} of positions used, {trained:.1%} of tokens trained"
    if part["prepared_windows"] < part["windows"]:
        text += f"; {part['prepared_windows']:,} of {part['windows']:,} windows prepared"
    if part["dropped"]:
        text += f"; {part['dropped']:,} documents dropped (longer than sequence_len)"
    if part["truncated"]:
        text += f"; {part['truncated']:,} documents cut to sequence_len"
    return text
