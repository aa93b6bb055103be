"""HTML pages with Plotly's charts: one file each, which loads nothing, and whose policy forbids it to.

What is drawn and said on them is the callers' business.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from nemo_ray.data.charts import text

REFRESH_S = 30
"""Of a page of what is still under way: it loads itself anew."""
MOST_POINTS = 300
"""Of a line: a long run's figures are thinned."""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_HEIGHT_PX = 380
_STYLE = """
table.sorted th[scope=col] { cursor: pointer; }
table.sorted td:last-child { min-width: 18em; }
pre { overflow-x: auto; user-select: all; }
"""
# A click on a column's head sorts by it, a second one the other way round.
_SORT = """
for (const table of document.querySelectorAll("table.sorted")) {
  const rows = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => head.addEventListener("click", () => {
    const sign = (head.dataset.sign = head.dataset.sign === "1" ? "-1" : "1");
    const key = (row) => row.cells[column].textContent.replaceAll(",", "");
    const compare = (a, b) => key(a) === "" ? 1 : key(b) === "" ? -1
      : (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b)) * sign;
    rows.append(...[...rows.rows].sort(compare));
  }));
}
"""
Tile = tuple[str, str, str]
"""Name, figure, and words below it."""


def page(title: str, tiles: Sequence[Tile], sections: Sequence[str], *, running: bool) -> str:
    """The whole page. `sections` are markup; `running`: whether it is of something that goes on."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">' if running else ""
    style = files("nemo_ray.data").joinpath("page.css").read_text(encoding="utf-8") + _STYLE
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{refresh}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><main>{_head(title, tiles)}{''.join(sections)}</main><script>{_SORT}</script></body></html>\n"
    )


def _head(title: str, tiles: Sequence[Tile]) -> str:
    cards = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(words)}</small></dd></div>"
        for name, value, words in tiles
    )
    return f'<header><h1>{text(title)}</h1><dl class="tiles">{cards}</dl></header>'


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of them, the last one among these."""
    every = max(1, -(-len(points) // MOST_POINTS))
    return list(points[::-1][::every][::-1])


def _as_words(value: Any) -> Any:
    """Text as Plotly has to be given it, which reads markup in it: links too."""
    if isinstance(value, str):
        return escape(value, quote=False)
    return [_as_words(one) for one in value] if isinstance(value, tuple | list) else value


def chart(figure: go.Figure) -> str:
    """Markup of one chart, as wide as the page."""
    for trace in figure.data:
        trace.update({key: _as_words(trace[key]) for key in ("name", "text", "x", "y")})
    for note in figure.layout.annotations:
        note.update({key: _as_words(note[key]) for key in ("text", "x", "y")})
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        axis.title.text = _as_words(axis.title.text)
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"orientation": "h", "y": -0.2},
    )
    options = {"responsive": True, "displaylogo": False}
    return str(
        to_html(
            figure, config=options, include_plotlyjs=False, full_html=False, default_height=f"{_HEIGHT_PX}px"
        )
    )
