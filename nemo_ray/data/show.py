"""Examples for the eye, on a terminal: the first rows as the model will see them, trained tokens set off."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from nemo_ray.data.examples import Example, Probe, Token
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.statistics import Totals, sum_of
from nemo_ray.visible import visible

_TRAINED = "bold green"
_SPECIAL = "dim"
_LEFT_OUT = "italic"


def show_probes(plan: DataPlan, probes: Sequence[Probe], console: Console) -> None:
    """Print the examples of each source. On a terminal trained tokens are green, else in «»."""
    for probe in probes:
        for example in probe.examples:
            console.rule(Text(visible(f"{example.file} row {example.row}")), align="left")
            _show(example, plan.sequence_len, console)
    console.rule()
    for probe in probes:
        _say(f"{plan.sources[probe.source].name}: {fate(sum_of([probe.stats]), plan.sequence_len)}", console)
    if len(probes) > 1:
        _say(f"together: {fate(sum_of(probe.stats for probe in probes), plan.sequence_len)}", console)


def _say(text: str, console: Console, style: str = "") -> None:
    console.print(Text(visible(text), style=style), soft_wrap=True)


def fate(totals: Totals, sequence_len: int) -> str:
    """What becomes of the first rows, in words."""
    given = f"the first {totals.rows:,} rows give {totals.documents:,} documents"
    if totals.documents:
        given += f" of {totals.tokens / totals.documents:,.0f} tokens on average"
        given += f" ({totals.targets / totals.tokens:.0%} trained)"
    parts = [given]
    if totals.num_rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in totals.reasons())
        parts.append(f"{totals.num_rejected:,} rows rejected ({reasons})")
    if totals.dropped:
        parts.append(f"{totals.dropped:,} documents dropped (longer than sequence_len {sequence_len})")
    if totals.truncated:
        parts.append(f"{totals.truncated:,} of the documents cut to sequence_len {sequence_len}")
    return ", ".join(parts)


def _show(example: Example, sequence_len: int, console: Console) -> None:
    if example.rejected:
        _say(f"rejected: {example.rejected}", console, "red")
        return
    text = coloured(example.tokens, console.is_terminal)
    if example.left_out:
        text.append(f" ... {example.left_out:,} tokens left out ... ", style=_LEFT_OUT)
    text.append_text(coloured(example.last, console.is_terminal))
    console.print(text, soft_wrap=True)
    words = f"{example.part}{example.part and ': '}"
    words += f"{example.num_tokens:,} tokens, {example.num_trained:,} trained "
    words += f"({example.num_trained / max(example.num_tokens, 1):.0%})"
    if example.too_long:
        words += f", longer than sequence_len {sequence_len}: {example.too_long}"
    _say(words, console, "dim")


def coloured(tokens: Sequence[Token], terminal: bool) -> Text:
    """The tokens' text; trained ones are styled, or bracketed where there are no colours."""
    text = Text()
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text.append("«" if trained and not terminal else "")
        for special, alike in groupby(run, key=lambda token: token.special):
            styles = [_TRAINED] * trained + [_SPECIAL] * special
            text.append(visible("".join(token.text for token in alike)), style=" ".join(styles))
        text.append("»" if trained and not terminal else "")
    return text
