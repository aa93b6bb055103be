"""Small charts in plain HTML and CSS: bars, stacked columns, tables. No script; a table stands behind each.

Every function returns markup, and escapes whatever text it is given.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from nemo_ray.visible import visible

NUM_COLOURS = 8
"""Classes c0..c7 of the style sheet; `c-other` is all that comes after."""

_MOST_TICKS = 6


class Column(NamedTuple):
    """One column of a chart: parts are (class, value), drawn upwards."""

    label: str
    parts: Sequence[tuple[str, float]]
    note: str
    """What the column says, for the pointer and for the table."""


class Markup(str):
    """Text that is markup already, and is not escaped again."""


def text(value: object) -> str:
    """Escaped, with control characters shown."""
    return escape(visible(str(value)), quote=True)


def number(value: float) -> str:
    """1,234 below ten thousand, then 12.3 k, 4.56 M, 7.89 G."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            digits = 2 if abs(value) < 10 * factor else 1 if abs(value) < 100 * factor else 0
            return f"{value / factor:.{digits}f} {unit}"
    raise AssertionError("a number of ten thousand or more has a unit")


def percent(part: float, whole: float) -> str:
    """12.3%, or a dash where there is nothing."""
    if not whole:
        return "–"
    share = part / whole
    return f"{share:.2%}" if 0.99 < share < 1 else f"{share:.1%}"


def columns(
    title: str,
    data: Sequence[Column],
    heads: Sequence[str],
    ticks: Sequence[str],
    *,
    top: float | None = None,
) -> str:
    """Columns of percentages on a scale from 0 to `top` (default: above the highest).

    `heads` are the two column titles of the table behind it; `ticks` stand under the columns' left edges, as
    many as there is room for; some may be empty.
    """
    highest = max((sum(value for _, value in column.parts) for column in data), default=0.0)
    top = top or _round_up(highest)
    drawn = "".join(_column(column, top) for column in data)
    scale = "".join(f'<span style="bottom:{share:.0%}">{top * share:g}%</span>' for share in (0.5, 1.0))
    marks = "".join(f"<span>{text(tick)}</span>" for tick in _thinned(ticks))
    rows = [[column.label, column.note] for column in data]
    return (
        f'<figure><figcaption>{text(title)}</figcaption><div class="chart">'
        f'<div class="scale" aria-hidden="true">{scale}</div>'
        f'<div class="columns" role="img" aria-label="{text(title)}; the table below has the figures">{drawn}'
        f'</div><div class="ticks" aria-hidden="true">{marks}</div></div>'
        f"<details><summary>Table</summary>{table(heads, rows)}</details></figure>"
    )


def _thinned(ticks: Sequence[str]) -> list[str]:
    """At most _MOST_TICKS of the ticks; the others, and those too near to the right edge, become empty."""
    named = [index for index, tick in enumerate(ticks) if tick]
    every = max(1, -(-len(named) // _MOST_TICKS))
    kept = {index for index in named[::every] if index + len(ticks) / (2 * _MOST_TICKS) <= len(ticks)}
    return [tick if index in kept else "" for index, tick in enumerate(ticks)]


def _column(column: Column, top: float) -> str:
    parts = "".join(
        f'<b class="{kind}" style="height:{100 * value / top:.4g}%"></b>'
        for kind, value in reversed(column.parts)
        if value > 0
    )
    return f'<i title="{text(f"{column.label}: {column.note}")}">{parts}</i>'


def _round_up(value: float) -> float:
    """A round percentage that is not below `value`."""
    return next((top for top in (1, 2, 4, 6, 10, 20, 40, 60, 80, 100) if top >= value), value)


def meter(part: float, whole: float, kind: str) -> Markup:
    """A share as a short bar and as a figure; for table cells."""
    width = 100 * part / whole if whole else 0.0
    return Markup(
        f'<span class="meter" aria-hidden="true"><b class="{kind}" style="width:{width:.4g}%"></b></span> '
        f"{percent(part, whole)}"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], *, kind: str = "figures") -> str:
    """A table that scrolls sideways where it is too wide. `kind`: figures, or words."""
    top = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    body = ""
    for row in rows:
        first, *others = [cell if isinstance(cell, Markup) else text(cell) for cell in row]
        body += f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(class, text) pairs as coloured squares with their names."""
    items = "".join(f'<li><b class="{kind}"></b>{text(name)}</li>' for kind, name in entries)
    return f'<ul class="legend">{items}</ul>'


def colour(index: int) -> str:
    """The class of a dataset's colour."""
    return f"c{index}" if index < NUM_COLOURS else "c-other"


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def soft(words: str) -> str:
    """A paragraph that explains."""
    return f'<p class="soft">{text(words)}</p>'


def plural(count: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"
