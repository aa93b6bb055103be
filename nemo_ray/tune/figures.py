"""The charts of a sweep's report, drawn by Plotly, and the statistics in them.

A trial that was stopped early has a worse value because it trained less: what parameters do is therefore read
at an evaluation that the compared trials all reached.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nemo_ray.config.translate import show
from nemo_ray.pages import thin
from nemo_ray.tune.space import Point
from nemo_ray.tune.trial import Evaluation

_FEWEST = 3  # trials that importance is told from


@dataclass(frozen=True)
class Trial:
    """What a report knows of a trial that has begun."""

    number: int
    point: Point
    state: str
    evaluations: Sequence[Evaluation]
    losses: Sequence[tuple[int, float]]
    """Step and training loss."""
    value: float | None
    """What it is judged by so far."""


def varied(trials: Sequence[Trial]) -> list[str]:
    """The parameters that differ between trials, in the order of the section."""
    names = trials[0].point if trials else ()
    return [name for name in names if len({show(trial.point[name]) for trial in trials}) > 1]


def curves(trials: Sequence[Trial], best: int | None, metric: str) -> go.Figure:
    """Each trial's metric at its evaluations."""
    lines = [(trial, [(e.step, e.value) for e in trial.evaluations]) for trial in trials]
    return _lines(lines, best, "lines+markers", metric)


def training(trials: Sequence[Trial], best: int | None) -> go.Figure:
    """Each trial's training loss."""
    return _lines([(trial, thin(trial.losses)) for trial in trials], best, "lines", "training loss")


def _lines(
    lines: Sequence[tuple[Trial, Sequence[tuple[int, float]]]], best: int | None, mode: str, title: str
) -> go.Figure:
    figure = go.Figure()
    for trial, points in lines:
        if points:
            steps, values = zip(*points, strict=True)
            own = {"width": 4} if trial.number == best else {"width": 1.5}
            figure.add_scatter(x=steps, y=values, mode=mode, line=own, name=_name(trial, best))
    return figure.update_layout(xaxis_title="step", yaxis_title=title)


def _judged(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]


def _name(trial: Trial, best: int | None) -> str:
    return f"trial {trial.number}{', best' if trial.number == best else ''}"


def landscape(trials: Sequence[Trial], best: int | None, metric: str) -> go.Figure | None:
    """The metric against the learning rate by rank, or against whatever numbers vary; None where none do."""
    trials = _judged(trials)
    names = [name for name in varied(trials) if _numeric(trials, name)]
    if not names:
        return None
    x = "learning_rate" if "learning_rate" in names else names[0]
    others = [name for name in varied(trials) if name != x]
    by = "lora_r" if "lora_r" in others else others[0] if others else None
    figure = go.Figure()
    for group in sorted({trial.point[by] for trial in trials}, key=_order) if by else [None]:
        own = [trial for trial in trials if by is None or trial.point[by] == group]
        own.sort(key=lambda trial: trial.point[x])
        figure.add_scatter(
            x=[trial.point[x] for trial in own],
            y=[trial.value for trial in own],
            text=[f"trial {trial.number}, {trial.state}" for trial in own],
            mode="markers",
            marker={"size": 11, "symbol": ["circle" if t.state == "finished" else "x" for t in own]},
            name=f"{by}={show(group)}" if by else "trials",
        )
    found = next((trial for trial in trials if trial.number == best), None)
    if found is not None:
        ring = {"size": 22, "symbol": "circle-open", "color": "#c4453f", "line": {"width": 3}}
        figure.add_scatter(x=[found.point[x]], y=[found.value], mode="markers", marker=ring, name="best")
    kind = "log" if _spans_decades([trial.point[x] for trial in trials]) else "linear"
    return figure.update_layout(xaxis_title=x, xaxis_type=kind, xaxis_exponentformat="e", yaxis_title=metric)


def parallel(trials: Sequence[Trial], metric: str) -> go.Figure | None:
    """Parallel coordinates of the parameters and the metric; None below two trials with a value.

    Drawn as lines: Plotly's own kind of chart needs WebGL, which not every browser has.
    """
    trials = _judged(trials)
    names = varied(trials)
    if len(trials) < 2 or not names:
        return None
    columns = {name: [trial.point[name] for trial in trials] for name in names}
    columns[metric] = [trial.value for trial in trials]
    heights = {name: _heights(values) for name, values in columns.items()}
    figure = go.Figure()
    for index, trial in enumerate(trials):
        colour = sample_colorscale("Viridis", heights[metric][index])[0]
        figure.add_scatter(
            x=list(columns),
            y=[heights[name][index] for name in columns],
            text=[f"trial {trial.number}: {name}={_say(columns[name][index])}" for name in columns],
            hoverinfo="text",
            mode="lines+markers",
            line={"color": colour, "width": 2},
        )
    for name, values in columns.items():
        for height in (0.0, 1.0):
            there = [v for v, h in zip(values, heights[name], strict=True) if h == height]
            if there:
                place = {"x": name, "y": height, "yshift": 14 if height else -14, "showarrow": False}
                figure.add_annotation(text=_say(there[0]), **place)
    axis = {"visible": False, "range": [-0.15, 1.15]}
    return figure.update_layout(showlegend=False, yaxis=axis)


def _heights(values: Sequence[Any]) -> list[float]:
    """Where values stand on an axis from 0 to 1: numbers by size (over decades by their logarithm), others in
    alphabetical order."""
    if _all_numbers(values):
        at = [math.log10(value) for value in values] if _spans_decades(values) else list(values)
    else:
        kinds = sorted({show(value) for value in values})
        at = [kinds.index(show(value)) for value in values]
    low, high = min(at), max(at)
    return [(value - low) / (high - low) if high > low else 0.5 for value in at]


def _say(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)


def importance(trials: Sequence[Trial]) -> tuple[int, int, dict[str, float]]:
    """How much of the trials' order each parameter explains alone.

    The share (0 to 1) of the variance of the values' ranks: Spearman's correlation squared for numbers, the
    correlation ratio for anything else.

    Returns: the evaluation at which the trials are compared, how many there are, and the shares, the largest
    first; empty below three trials.
    """
    reached = [trial for trial in trials if trial.evaluations]
    if len(reached) < _FEWEST:
        return 0, len(reached), {}
    at = min(len(trial.evaluations) for trial in reached)
    ranks = _ranks([trial.evaluations[at - 1].value for trial in reached])
    shares = {}
    for name in varied(reached):
        values = [trial.point[name] for trial in reached]
        if _all_numbers(values):
            shares[name] = float(np.corrcoef(_ranks(values), ranks)[0, 1] ** 2) if ranks.std() else 0.0
        else:
            shares[name] = _correlation_ratio([show(value) for value in values], ranks)
    return at, len(reached), dict(sorted(shares.items(), key=lambda item: -item[1]))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def _correlation_ratio(kinds: Sequence[str], ranks: np.ndarray) -> float:
    names = np.asarray(kinds)
    between = sum(
        (names == kind).sum() * (ranks[names == kind].mean() - ranks.mean()) ** 2 for kind in set(kinds)
    )
    return float(between / ranks.size / ranks.var()) if ranks.var() else 0.0


def importance_bars(shares: Mapping[str, float]) -> go.Figure:
    """Bars of `importance`, the largest on top."""
    names = list(shares)[::-1]
    figure = go.Figure(go.Bar(x=[shares[name] for name in names], y=names, orientation="h"))
    return figure.update_layout(xaxis_title="share of the order explained", xaxis_range=[0, 1])


def _all_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _numeric(trials: Sequence[Trial], name: str) -> bool:
    return _all_numbers([trial.point[name] for trial in trials])


def _spans_decades(values: Sequence[Any]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 10


def _order(value: Any) -> tuple[bool, Any]:
    return (False, value) if _all_numbers([value]) else (True, show(value))
