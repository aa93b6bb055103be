"""The charts of the data page: lengths, trained tokens, packs and the mix. Pure functions of its facts."""

import math
from collections.abc import Sequence
from typing import Any

from nemo_ray.data.charts import (
    NUM_COLOURS,
    Column,
    colour,
    columns,
    legend,
    meter,
    number,
    percent,
    plural,
    section,
    soft,
    table,
)
from nemo_ray.data.histograms import EDGES

Facts = dict[str, Any]

_MOST_SOURCES = 12
"""Datasets with charts of their own; tables have them all."""


def _sources(facts: Facts) -> list[dict[str, Any]]:
    """The sources' statistics, each with its short name as `label`."""
    sources = facts["statistics"]["sources"]
    return [{**source, "label": label} for source, label in zip(sources, facts["labels"], strict=True)]


def _charted(facts: Facts) -> list[dict[str, Any]]:
    """The sources with documents, the largest ones where there are many."""
    sources = [source for source in _sources(facts) if any(source["train"]["histograms"].get("lengths", ()))]
    largest = sorted(sources, key=lambda source: -source["train"]["tokens"])[:_MOST_SOURCES]
    return [source for source in sources if source in largest]


def _left_out(facts: Facts) -> str:
    """A sentence where not every dataset has a chart."""
    num_sources = len(facts["labels"])
    return f" The {_MOST_SOURCES} largest of {num_sources} datasets." if num_sources > _MOST_SOURCES else ""


def _histogram(
    title: str, name: str, counts: Sequence[int], bins: Sequence[int], kinds: Sequence[str], what: str
) -> str:
    """The bins of EDGES[name] with these numbers, as percentages of all; `what` is counted."""
    total = sum(counts)
    data, ticks = [], []
    for index, kind in zip(bins, kinds, strict=True):
        count = counts[index] if index < len(counts) else 0
        label, tick = _bin_names(name, index)
        note = f"{plural(count, what)}, {percent(count, total)}"
        data.append(Column(label, [(kind, 100 * count / max(total, 1))], note))
        ticks.append(tick)
    heads = ("part", f"{what}s") if EDGES[name][-1] <= 1 else ("number", f"{what}s")
    return columns(title, data, heads, ticks)


def _bin_names(name: str, index: int) -> tuple[str, str]:
    """The whole bin in words, and its tick: the lower edge, of longer axes powers of 2 only."""
    edges = EDGES[name]
    low = edges[index]
    if edges[-1] <= 1:
        high = edges[index + 1] if index + 1 < len(edges) else 1.0
        return ("full" if low == high else f"{100 * low:g} to {100 * high:g}%"), f"{100 * low:g}"
    high = edges[index + 1] - 1
    tick = number(low) if low < 4 or low == 2 ** round(math.log2(low)) else ""
    return (f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"), tick


def _pair(charts: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(charts)}</div>'


# -- documents ----------------------------------------------------------------------------------------


def lengths(facts: Facts) -> str:
    """Tokens of the documents, a histogram for each dataset on a common axis."""
    sequence_len = facts["statistics"]["sequence_len"]
    shown = [(source, source["train"]["histograms"]["lengths"]) for source in _charted(facts)]
    filled = [index for _, counts in shown for index, count in enumerate(counts) if count]
    if not filled:
        return section("Document lengths", soft("There is no document."))
    bins = range(min(filled), max(filled) + 1)
    kinds = [_side(index, sequence_len) for index in bins]
    charts = [
        _histogram(
            f"{source['label']}: {plural(sum(counts), 'document')}",
            "lengths",
            counts,
            bins,
            kinds,
            "document",
        )
        for source, counts in shown
    ]
    names = {
        "b-kept": f"up to sequence_len {sequence_len:,}",
        "b-cut": "around it",
        "b-lost": "longer: dropped or cut",
    }
    words = "Tokens of each document, before any is dropped or cut, in four bins to a doubling."
    words += _left_out(facts)
    entries = [(kind, name) for kind, name in names.items() if kind in kinds]
    return section("Document lengths", soft(words), legend(entries), _pair(charts))


def _side(index: int, sequence_len: int) -> str:
    """On which side of sequence_len a bin of lengths is."""
    low, high = EDGES["lengths"][index], EDGES["lengths"][index + 1] - 1
    if high <= sequence_len:
        return "b-kept"
    return "b-lost" if low >= sequence_len else "b-cut"


def trained(facts: Facts) -> str:
    """How much of the documents is trained."""
    charts = []
    for source in _charted(facts):
        part = source["train"]
        counts = part["histograms"]["trained_shares"]
        title = f"{source['label']}: {percent(part['targets'], part['tokens'])} of its tokens"
        charts.append(_histogram(title, "trained_shares", counts, range(10), ["b-kept"] * 10, "document"))
    words = "The part of each document's tokens that is trained, in %: targets of the loss."
    words += _left_out(facts)
    return section("Trained tokens", soft(words), _pair(charts))


# -- packs --------------------------------------------------------------------------------------------


def packing(facts: Facts) -> str:
    """How full packs are, and of how many documents."""
    train = facts["statistics"]["train"]
    if not train["packs"]:
        return section("Packing", soft("There is no pack."))
    fill, documents = train["histograms"]["pack_fill"], train["histograms"]["pack_documents"]
    first = next(index for index, count in enumerate(documents) if count)
    bins = range(first, len(documents))
    all_fills = range(len(EDGES["pack_fill"]))
    words = (
        f"{plural(train['packs'], 'pack')} of {facts['statistics']['sequence_len']:,} tokens hold "
        f"{plural(train['documents'], 'document')}, {train['documents'] / train['packs']:,.1f} a pack; "
        f"{percent(train['efficiency'], 1)} of positions hold a token, the rest is padding."
    )
    charts = [
        _histogram(
            "How full packs are, in %", "pack_fill", fill, all_fills, ["b-kept"] * len(all_fills), "pack"
        ),
        _histogram("Documents in a pack", "pack_documents", documents, bins, ["b-kept"] * len(bins), "pack"),
    ]
    return section("Packing", soft(words), _pair(charts))


# -- the mix ------------------------------------------------------------------------------------------


def mixing(facts: Facts) -> str:
    """What each dataset gives, and how that moves over the epoch."""
    mix = facts["mix"]
    keep = [number for number, source in enumerate(_sources(facts)) if not source["evaluation_only"]]
    sources = [_sources(facts)[number] for number in keep]
    planned = [mix["planned_tokens"][number] for number in keep]
    slices = [[one[number] for number in keep] for one in mix["slices"]]
    real = [sum(one[place] for one in slices) for place in range(len(keep))]
    heads = ("dataset", "rows", "tokens planned", "tokens", "trained tokens")
    parts = [source["train"] for source in sources]
    rows = []
    for place, source in enumerate(sources):
        kind = colour(place)
        figures = (
            ([part["rows"] for part in parts], parts[place]["rows"]),
            (planned, planned[place]),
            (real, real[place]),
            ([part["targets"] for part in parts], parts[place]["targets"]),
        )
        rows.append([source["label"], *(meter(own, sum(every), kind) for every, own in figures)])
    words = (
        "Parts of an epoch. Planned: estimated from some rows, before anything was prepared; tokens: "
        "in the order in which the epoch is trained"
    )
    if mix["estimated_windows"]:
        words += f", where {plural(mix['estimated_windows'], 'window')} without a shard counts as estimated"
    return section("Mixing", soft(words + "."), table(heads, rows), _slices(sources, slices))


def _slices(sources: Sequence[dict[str, Any]], slices: Sequence[Sequence[float]]) -> str:
    if len(sources) < 2 or not slices:
        return ""
    entries = [(colour(place), source["label"]) for place, source in enumerate(sources[:NUM_COLOURS])]
    if len(sources) > NUM_COLOURS:
        entries.append((colour(NUM_COLOURS), f"{len(sources) - NUM_COLOURS} more"))
    data, ticks = [], []
    for index, one in enumerate(slices):
        total = sum(one) or 1
        shares = [(colour(place), 100 * amount / total) for place, amount in enumerate(one)]
        note = ", ".join(
            f"{source['label']} {percent(amount, total)}" for source, amount in zip(sources, one, strict=True)
        )
        first, last = 100 * index / len(slices), 100 * (index + 1) / len(slices)
        data.append(Column(f"{first:.0f} to {last:.0f}% of the epoch", shares, note))
        ticks.append(f"{first:.0f}%")
    title = "The mix over one epoch, by tokens"
    return legend(entries) + columns(title, data, ("slice", "parts"), ticks, top=100.0)
