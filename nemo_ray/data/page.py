"""The data page: one HTML file to look at before (or after) a run. Self-contained, without scripts.

A pure function of the dict that page_facts.py makes. Everything in it may come from a row of a dataset, so
all text goes through charts.text, and a content policy forbids the page to load or run anything.
"""

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from nemo_ray.data import page_charts
from nemo_ray.data.charts import number, percent, plural, section, soft, table, text

Facts = dict[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MOST_REJECTED = 60


def data_page(facts: Facts) -> str:
    """The page's HTML."""
    charts = (page_charts.lengths, page_charts.trained, page_charts.packing, page_charts.mixing)
    parts = (_head, _datasets, *charts, _skipped, _examples, _settings)
    style = files("nemo_ray.data").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part(facts) for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Data of {text(facts['title'])}</title><style>{style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


# -- what it is about ---------------------------------------------------------------------------------


def _head(facts: Facts) -> str:
    statistics = facts["statistics"]
    train, held_out = statistics["train"], statistics["held_out"]
    probed = facts["probed_rows"] is not None
    tokens = train["estimated_tokens"] if probed else train["tokens"]
    sequence_len = statistics["sequence_len"]
    held = f"{plural(held_out['planned_rows'], 'row')} held out" if held_out["windows"] else "none held out"
    lost = sum(train["rejected"].values())
    tiles = [
        ("Rows", number(train["planned_rows"]), held),
        ("Tokens", number(tokens), f"{'estimated, ' if probed else ''}in packs of {sequence_len:,}"),
        ("Trained", percent(train["targets"], train["tokens"]), "of all tokens"),
        ("Packs filled", percent(train["efficiency"] or 0, 1), "of positions hold a token"),
        ("Rejected", number(lost), f"of {plural(train['rows'], 'row')} read"),
        ("Windows", f"{train['prepared_windows']:,} of {train['windows']:,}", "prepared for training"),
    ]
    cards = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(words)}</small></dd></div>"
        for name, value, words in tiles
    )
    return (
        f"<header><h1>Data of {text(facts['title'])}</h1>{soft('Prepared in ' + facts['directory'])}"
        f'<dl class="tiles">{cards}</dl>{_how_far(facts)}</header>'
    )


def _how_far(facts: Facts) -> str:
    train = facts["statistics"]["train"]
    notes = list(facts["notices"])
    if facts["probed_rows"] is not None:
        notes.insert(
            0,
            f"Nothing is prepared yet: this page shows the first {plural(facts['probed_rows'], 'row')} of "
            "the datasets, packed among themselves. The command prepares all without --show.",
        )
    elif train["prepared_windows"] < train["windows"]:
        notes.insert(
            0,
            f"{train['prepared_windows']:,} of {train['windows']:,} windows are prepared, with "
            f"{number(train['rows'])} of {plural(train['planned_rows'], 'row')}: this page shows these.",
        )
    return "".join(f'<p class="note">{text(note)}</p>' for note in notes)


def _datasets(facts: Facts) -> str:
    heads = ("dataset", "type", "files", "rows", "held out", "documents", "tokens", "tokens each")
    rows = []
    for source in facts["statistics"]["sources"]:
        part = source["train"]
        each = number(part["tokens"] / part["documents"]) if part["documents"] else "–"
        name = source["name"] + (" (evaluation)" if source["evaluation_only"] else "")
        counts = (source["files"], source["rows"], source["held_out_rows"], part["documents"], part["tokens"])
        rows.append([name, source["type"], *map(number, counts), each])
    return section("Datasets", table(heads, rows))


# -- rows that are not trained on ---------------------------------------------------------------------


def _skipped(facts: Facts) -> str:
    statistics = facts["statistics"]
    rows = []
    for name, part in (("training rows", statistics["train"]), ("held-out rows", statistics["held_out"])):
        fates = [(f"rejected: {reason}", count) for reason, count in part["rejected"].items()]
        fates += [("dropped: longer than sequence_len", part["dropped"])]
        fates += [("cut to sequence_len, and kept", part["truncated"]), ("blank lines", part["blank_lines"])]
        rows += [[fate, name, number(count), percent(count, part["rows"])] for fate, count in fates if count]
    examples = [
        [example["reason"], f"{example['file']} row {example['row']}", example["detail"]]
        for example in sorted(statistics["rejected_examples"], key=lambda one: one["reason"])[:_MOST_REJECTED]
    ]
    if not rows:
        return section("Skipped rows", soft("None: every row became a document."))
    parts = [table(("what", "of", "rows", "part"), rows)]
    if examples:
        parts.append("<h3>Rejected, for example</h3>")
        parts.append(table(("reason", "row (from 0)", "detail"), examples, kind="words"))
    return section("Skipped rows", *parts)


# -- examples and settings ----------------------------------------------------------------------------


def _examples(facts: Facts) -> str:
    sources = facts["statistics"]["sources"]
    parts = [soft("Trained tokens stand on green, special tokens are pale. Point at a token for its id.")]
    for number_of, group in groupby(facts["examples"], key=lambda example: example["source"]):
        parts.append(f"<h3>{text(sources[number_of]['name'])}</h3>")
        parts += [_example(example, facts["statistics"]["sequence_len"]) for example in group]
    return section("Examples", *parts)


def _example(example: dict[str, Any], sequence_len: int) -> str:
    place = example["place"]
    if example["rejected"]:
        words = f'<span class="bad">rejected: {text(example["rejected"])}</span>'
        return f'<div class="row"><p class="soft">{text(place)}: {words}</p></div>'
    words = f"{place}: {plural(example['num_tokens'], 'token')}, {number(example['num_trained'])} trained "
    words += f"({percent(example['num_trained'], example['num_tokens'])})"
    if example["too_long"]:
        words += f", longer than sequence_len {sequence_len:,}: {example['too_long']}"
    tokens = _tokens(example["tokens"])
    if example["left_out"]:
        tokens += f'<span class="gap"> ... {plural(example["left_out"], "token")} left out ... </span>'
    tokens += _tokens(example["last"])
    return f'<div class="row">{soft(words)}<pre tabindex="0">{tokens}</pre></div>'


def _tokens(tokens: Sequence[list[Any]]) -> str:
    markup = ""
    for trained, run in groupby(tokens, key=lambda token: token[2]):
        inner = "".join(map(_token, run))
        markup += f"<mark>{inner}</mark>" if trained else inner
    return markup


def _token(token: list[Any]) -> str:
    content, ids, _, special = token
    kind = ' class="s"' if special else ""
    return f'<i{kind} title="{" ".join(map(str, ids))}">{text(content)}</i>'


def _settings(facts: Facts) -> str:
    rows = [*facts["settings"], ["fingerprint", facts["fingerprint"]]]
    return section("Settings", table(("key", "value"), rows, kind="words"))
