"""Words of others stay words: a page has the same elements and attributes whatever they say.

tests/data/test_page.py, tests/view/test_report.py and tests/tune/test_report.py have what is said on them.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray import pages
from nemo_ray.cli import main
from nemo_ray.data import charts as data_charts
from nemo_ray.data.examples import probe_sources
from nemo_ray.data.page import data_page
from nemo_ray.data.page_facts import page_facts
from nemo_ray.storage import publish_json
from nemo_ray.tune.sweep_dir import TrialEnd
from tests.data.helpers import chats, write_lines, write_tokenizer
from tests.data.test_page import load
from tests.train.test_launch import data_plan
from tests.tune.test_report import POINTS, charts, write_sweep
from tests.view import runs
from tests.view.runs import write_run

pytestmark = pytest.mark.timeout(60)
HARMLESS = "words"
ATTACKS = {
    "elements": '<script>alert(1)</script><a href="javascript:alert(1)">words</a>',
    "attributes": '" onmouseover="alert(1)" \' onmouseover=\'alert(1)',
    "ends": "</title></pre></td></style></script><img src=x onerror=alert(1)>",
    "others": "<b>&lt;i&gt; &#60;i&#62; \\u003ci\\u003e <!-- <![CDATA[",
}


class Markup(HTMLParser):
    """What a page is made of: elements with the names of their attributes, comments, declarations."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: Counter[tuple[str, ...]] = Counter()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts[tag, *sorted(name for name, _ in attrs)] += 1

    def handle_comment(self, data: str) -> None:
        self.parts["comment"] += 1

    def unknown_decl(self, data: str) -> None:
        self.parts["declaration"] += 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("base"))
    (folder / "config.json").write_text('{"model_type": "nemotron_h"}')
    return folder


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 5 MB of script are the same on every page."""
    monkeypatch.setattr(pages, "get_plotlyjs", lambda: "")


def name_of(words: str) -> str:
    """As much of them as a file's name can hold."""
    return words.replace("/", "")


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_markup_is_noticed(attack: str) -> None:
    for page in ("<p>{}</p>", "<p title=\"{}\" lang='{}'></p>", "<script>'{}'</script>"):
        changed = [Markup(page.replace("{}", words)).parts for words in (HARMLESS, attack)]
        if changed[0] != changed[1]:
            return
    pytest.fail("nothing is changed by it")


# -- of a run -------------------------------------------------------------------------------------


def run_with(path: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which everything that can be words says `words`."""
    monkeypatch.setattr(runs, "SCRIPT", words)  # its prompt
    config = {"base_model": words, "output_dir": words, "completion_prompts": [words], "wandb_name": words}
    config |= {"datasets": [{"path": words, words: words}], words: words, "adapter": words}
    failure = {"time": words, "line": words, "restart": True}
    run = write_run(
        path / name_of(words),
        config=config,
        notices=[words],
        error=words,
        outcome=words,
        started_at=words,
        ended_at=words,
        failures=[failure],
        earlier=[{"started_at": words, "outcome": words, "error": words, "failures": [failure]}],
        profile={"first_step": 1, "steps": 2, "step_ms": 9.0, "busy_ms": 8.0, "communication_alone_ms": 1.0}
        | {"class_ms": {words: 1.0, "communication": 2.0}},
    )
    losses = {name: {"loss": 3.0, "tokens": 5} for name in ("a", words)}
    run.append_metrics({"step": 50, "eval_loss": 3.0, "eval_datasets": losses})
    run.append_completion({"prompt": words, "completion": words, "stage": words, "step": words})
    plan = data_plan()
    source = dataclasses.replace(plan.sources[0], name=words, type=words)
    publish_json(run.data_plan_file, dataclasses.replace(plan, sources=(source,)).to_json())
    run.progress_file.write_text(json.dumps({"phase": words, "max_steps": words}))
    return run.path


def report_of(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_report_of_a_run(tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = report_of(run_with(tmp_path / "harmless", HARMLESS, monkeypatch))
    assert wanted.count(HARMLESS) > 25
    found = report_of(run_with(tmp_path / "attack", attack, monkeypatch))
    assert Markup(found).parts == Markup(wanted).parts


def test_words_that_are_not_escaped_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = report_of(run_with(tmp_path / "harmless", HARMLESS, monkeypatch))
    monkeypatch.setattr(data_charts, "escape", lambda words, quote: words)
    found = report_of(run_with(tmp_path / "attack", ATTACKS["elements"], monkeypatch))
    assert ("a", "href") in Markup(found).parts and ("a", "href") not in Markup(wanted).parts


# -- of a sweep -----------------------------------------------------------------------------------


def sweep_with(path: Path, words: str) -> Path:
    """The same of a sweep: names and values of parameters, the metric, why trials ended, its own name."""
    points = [{**point, words: f"{words}{number % 2}"} for number, point in enumerate(POINTS)]
    points = [{**point, "lora_target_modules": [words]} for point in points]
    config = {"base_model": words, "output_dir": words, words: [words], "deepspeed": None}
    folder = write_sweep(path / name_of(words), trials=points, config=config)
    folder.write_end(TrialEnd(2, words, 1, 3.9, 10, words, 0))
    folder.write_end(TrialEnd(3, "failed", 1, 5.0, 10, words))
    for number in range(4):
        run = folder.trial(number)
        rows = run.read_metrics()
        for row in rows:
            if "eval_loss" in row:
                row["eval_datasets"] = {words: {"loss": row["eval_loss"]}}
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.write({**folder.read(), "tune": {"metric": f"eval_loss/{words}", "mode": "min"}})
    return folder.path


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_report_of_a_sweep(tmp_path: Path, attack: str) -> None:
    wanted = report_of(sweep_with(tmp_path / "harmless", HARMLESS))
    assert wanted.count(HARMLESS) > 15
    found = report_of(sweep_with(tmp_path / "attack", attack))
    assert Markup(found).parts == Markup(wanted).parts


# -- of charts ------------------------------------------------------------------------------------


def labels(page: str) -> Iterator[str]:
    """What Plotly writes into its charts, and reads `<a>`, `<b>` and `<br>` in."""
    for trace in (trace for traces in charts(page) for trace in traces):
        for values in ([trace.get("name", "")], *(trace.get(key, []) for key in ("text", "x", "y"))):
            yield from (value for value in values if isinstance(value, str))


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_no_words_become_links_in_a_chart(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link = '<a href="https://example.com">words</a>'
    folder = run_with(tmp_path, link, monkeypatch) if kind == "run" else sweep_with(tmp_path, link)
    found = list(labels(report_of(folder)))
    assert any("example.com" in label for label in found), "the words are there"
    assert not [label for label in found if "<a " in label]


# -- of data --------------------------------------------------------------------------------------


def data_with(folder: Path, base: Path, words: str, in_rows: str) -> str:
    """The page of data whose paths and settings say `words`, and whose rows say `in_rows`."""
    said = [{"role": "user", "content": in_rows}, {"role": "assistant", "content": in_rows}]
    rows: list[Any] = [{"messages": said}, {"messages": said[:1]}, {in_rows: in_rows}]
    rows += [{"messages": [{"role": in_rows, "content": in_rows}, *said]}, *chats(80, words=6)]
    name = name_of(words)
    write_lines(folder / f"{name}.jsonl", rows)
    write_lines(
        folder / name / "texts.jsonl", [{"text": in_rows}, *({"text": "the quick"} for _ in range(80))]
    )
    values = {
        "base_model": str(base),
        "datasets": [
            {"path": str(folder / f"{name}.jsonl")},
            {"path": str(folder / name), "type": "completion"},
        ],
        "sequence_len": 128,
        "output_dir": str(folder / "out" / words),
        "chat_template_kwargs": {words: words},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    config, plan = load(folder / "run.yaml")
    plan = dataclasses.replace(plan, notices=(words,))
    return data_page(page_facts(plan, config, probe_sources(plan, config.data, str(base), 8)))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_page_of_data(tmp_path: Path, base: Path, attack: str) -> None:
    """Tokens and bars are elements: other rows make other numbers of them, and no other kind."""
    wanted = data_with(tmp_path / "harmless", base, HARMLESS, HARMLESS)
    assert wanted.count(HARMLESS) > 15
    named = data_with(tmp_path / "named", base, attack, HARMLESS)
    assert Markup(named).parts == Markup(wanted).parts
    rows = data_with(tmp_path / "rows", base, HARMLESS, attack)
    assert Markup(rows).parts.keys() <= Markup(wanted).parts.keys()
