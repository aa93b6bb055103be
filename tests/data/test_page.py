"""What the user sees of the data: examples on the terminal, and the page. Without Ray."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray import session
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data import charts, examples, sources
from nemo_ray.data.__main__ import main
from nemo_ray.data.ahead import prepared_directory
from nemo_ray.data.encode import Sample
from nemo_ray.data.examples import Example, Token, probe_sources, token_texts
from nemo_ray.data.histograms import EDGES, count, shard_histograms
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.mix import SLICES, epoch_mix
from nemo_ray.data.page import data_page
from nemo_ray.data.page_facts import page_facts
from nemo_ray.data.show import coloured
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics
from nemo_ray.data.tokenizer import TokenizerSpec, load_tokenizer
from tests.data.helpers import chats, prepare_all, write_lines

ATTACK = "<script>alert('x')</script>\" onload='y' & \x1b[31mred\u202e"
_VOID = ("meta", "br")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)


class Page(HTMLParser):
    """Reads a page; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def assert_harmless(self) -> None:
        """It loads nothing, runs nothing, and controls no terminal that shows its source."""
        assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in self.tags}
        names = {name for _, attributes in self.tags for name in attributes}
        assert not any(name.startswith("on") for name in names) and not {"src", "href"} & names
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", self.words)
        policy = {"http-equiv": "Content-Security-Policy"}
        policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
        assert ("meta", policy) in self.tags


def write_config(tmp_path: Path, base: Path, **keys: Any) -> Path:
    """Two datasets, one of which holds an attack, a row without an answer, and one that is too long."""
    rows = chats(400, words=6)
    rows[0] = {"messages": [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}]}
    rows[1] = {"messages": [{"role": "user", "content": "x"}]}
    rows[2]["messages"][1]["content"] = "word " * 500
    write_lines(tmp_path / "chats.jsonl", rows)
    write_lines(tmp_path / "texts<b>.jsonl", [{"text": "the quick brown fox " * 9}] * 150)
    path = tmp_path / "run.yaml"
    values = {
        "base_model": str(base),
        "datasets": [
            {"path": str(tmp_path / "chats.jsonl")},
            {"path": str(tmp_path / "texts<b>.jsonl"), "type": "completion"},
        ],
        "sequence_len": 128,
        "val_set_size": 0.1,
        "output_dir": str(tmp_path / "out"),
        **keys,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def load(path: Path) -> tuple[Config, DataPlan]:
    config = load_config(str(path), []).config
    return config, plan_data(config.data, config.base_model, prepared_directory(config))


def test_show_names_what_becomes_of_the_first_rows(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_config(tmp_path, base)), "--show", "3"]) == 0
    out = capsys.readouterr().out
    assert "«<script>alert('x')</script>\" onload='y' & ␛[31mred\\u202e<|im_end|>»" in out
    assert "\x1b" not in out and "\u202e" not in out
    assert "rejected: no assistant turn" in out
    assert re.search(r"[\d,]+ tokens, [\d,]+ trained \(\d+%\), longer than sequence_len 128: dropped", out)
    assert re.search(
        r"chats.jsonl: the first \d+ rows give \d+ documents .*, 1 rows rejected \(1 no assistant", out
    )
    assert re.search(r"together: the first \d+ rows .*, 1 rows rejected .*, \d+ documents dropped", out)
    assert f"page: {tmp_path / 'out' / 'data.html'}" in out


def test_overrides_may_follow_options(base: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, base)
    assert main([str(config), "--show", "1", f"output_dir={tmp_path / 'other'}"]) == 0
    assert (tmp_path / "other" / "data.html").exists() and not (tmp_path / "out").exists()


def test_a_page_before_anything_is_prepared(base: Path, tmp_path: Path) -> None:
    assert main([str(write_config(tmp_path, base)), "--show", "2"]) == 0
    html = (tmp_path / "out" / "data.html").read_text()
    page = Page(html)
    page.assert_harmless()
    assert "Nothing is prepared yet: this page shows the first " in page.words
    assert "<script>alert('x')</script>\" onload='y' & ␛[31mred\\u202e" in page.words
    assert "texts<b>.jsonl" in page.words and "no assistant turn" in page.words
    assert len(html) < 300_000 and not list((tmp_path / "out" / "prepared").glob("*.arrow"))


def test_a_page_of_what_was_prepared_needs_no_ray(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, base)
    config, plan = load(path)
    prepare_all(plan, config.data, base)
    monkeypatch.setattr(session, "start_local", lambda *_: pytest.fail("Ray is started for nothing"))
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    count = len(plan.windows) + len(plan.eval_windows)
    assert f"all {count} windows were prepared already" in out
    assert f"rejected rows are listed in {tmp_path / 'out' / 'rejected.jsonl'}" in out
    page = Page((tmp_path / "out" / "data.html").read_text())
    page.assert_harmless()
    train = data_statistics(plan)["train"]
    assert f"{train['packs']:,} packs of 128 tokens hold {train['documents']:,} documents" in page.words
    assert "rejected: no assistant turn" in page.words and "dropped: longer than sequence_len" in page.words
    assert f"{tmp_path / 'chats.jsonl'} row 1" in page.words
    shown = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("role") == "img"]
    tables = page.words.count("Table")
    assert len(shown) == tables >= 6 and all(attributes["aria-label"] for attributes in shown)


def test_a_page_of_a_part(base: Path, tmp_path: Path) -> None:
    config, plan = load(write_config(tmp_path, base))
    prepare_all(plan, config.data, base, plan.windows[:2])
    facts = page_facts(plan, config, probe_sources(plan, config.data, str(base), 1))
    assert json.loads(json.dumps(facts)) == facts
    page = Page(data_page(facts))
    assert f"2 of {len(plan.windows)} windows are prepared" in page.words
    assert f"{len(plan.windows) - 2} windows without a shard" in page.words


def test_long_examples_are_shortened(base: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, base)
    write_lines(tmp_path / "texts<b>.jsonl", [{"text": "lazy wizards box 12 34 " * 3000}] * 40)
    main([str(path), "--show", "8"])
    html = (tmp_path / "out" / "data.html").read_text()
    assert len(html) < 400_000 and "tokens left out" in Page(html).words


def test_a_long_row_is_shown_by_its_beginning_and_its_end(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, base)
    text = "the first " + "🎉🙂 quick " * 20_000 + "the last"
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat}] + chats(20))
    config, plan = load(path)
    whole = load_tokenizer(TokenizerSpec(str(base), "tokenizer_default", ())).tokenizer.encode(text).ids
    decoded: list[int] = []
    monkeypatch.setattr(examples, "_decode", counted(examples._decode, decoded))
    (example,) = probe_sources(plan, config.data, str(base), 1)[0].examples
    assert max(decoded) <= 16 and len(decoded) < 9_000
    assert example.num_tokens > len(whole) > 100_000 and example.num_trained == len(whole) + 1
    shown = [token for part in (example.tokens, example.last) for token in part]
    assert example.left_out == example.num_tokens - sum(len(token.ids) for token in shown) > 100_000
    assert all("\ufffd" not in token.text for token in shown)
    beginning, end = ("".join(token.text for token in part) for part in (example.tokens, example.last))
    assert beginning.startswith("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nthe first 🎉🙂 quick")
    assert end.endswith("🎉🙂 quick the last<|im_end|>\n")

    assert main([str(path), "--show", "1"]) == 0
    out = capsys.readouterr().out
    left_out = f"... {example.left_out:,} tokens left out ..."
    assert f"» {left_out} «" in out and "the last<|im_end|>»" in out
    assert f"{example.num_tokens:,} tokens, {example.num_trained:,} trained" in out and len(out) < 40_000
    html = (tmp_path / "out" / "data.html").read_text()
    words = Page(html).words
    assert f"... {charts.plural(example.left_out, 'token')} left out ..." in words
    assert "the last<|im_end|>" in words and len(html) < 400_000
    assert (
        f"{charts.plural(example.num_tokens, 'token')}, {charts.number(example.num_trained)} trained" in words
    )


def counted(decode: Any, sizes: list[int]) -> Any:
    """`decode`, which notes how many ids it is given."""

    def noting(tokenizer: Any, ids: list[int]) -> Any:
        sizes.append(len(ids))
        return decode(tokenizer, ids)

    return noting


@pytest.mark.parametrize("room", [40, 41, 400, 1_900, 2_200, 2_999, 3_999, 10_000])
@pytest.mark.parametrize("words", [10, 500, 1_900, 60_000])
def test_a_shortened_example_counts_what_it_leaves_out(base: Path, room: int, words: int) -> None:
    loaded = load_tokenizer(TokenizerSpec(str(base), "tokenizer_default", ()))
    ids = np.array(loaded.tokenizer.encode(" 🎉 quick" * words).ids, dtype=np.int32)
    head, last = examples._shown(Sample(ids, np.ones(len(ids), dtype=np.uint8)), loaded.tokenizer)
    whole = Example("file", 0, "", head, last, len(ids), 0, "", "")
    part = whole.shortened(room)
    assert len(part.tokens) + len(part.last) <= room
    first = [number for token in part.tokens for number in token.ids]
    end = [number for token in part.last for number in token.ids]
    assert first + ids.tolist()[len(first) : len(ids) - len(end)] + end == ids.tolist()
    assert part.left_out == len(ids) - len(first) - len(end) >= 0
    assert (part == whole) == (len(whole.tokens) + len(whole.last) <= room)


def test_neighbours_of_one_colour_are_one_run() -> None:
    tokens = [Token("a", (1,), False, False)] * 500 + [Token("\x1b", (2,), True, False)] * 500
    tokens += [Token("<s>", (3,), True, True), Token("b", (1,), False, False)]
    text = coloured(tokens, terminal=True)
    assert text.plain == "a" * 500 + "␛" * 500 + "<s>b"
    assert [(span.start, span.end, span.style) for span in text.spans] == [
        (500, 1000, "bold green"),
        (1000, 1003, "bold green dim"),
    ]
    assert coloured(tokens, terminal=False).plain == "a" * 500 + "«" + "␛" * 500 + "<s>»b"


@settings(max_examples=20, deadline=None)
@given(attack=st.text(min_size=1, max_size=40))
def test_no_text_of_a_row_or_key_becomes_markup(attack: str, base: Path, tmp_path_factory: Any) -> None:
    tmp_path = tmp_path_factory.mktemp("page")
    config, plan = load(write_config(tmp_path, base))
    facts = page_facts(plan, config, probe_sources(plan, config.data, str(base), 1))
    facts |= {"title": attack, "notices": [attack], "settings": [[attack, attack]], "labels": [attack] * 2}
    tags = [tag for tag, _ in Page(data_page(facts)).tags]
    for source in facts["statistics"]["sources"]:
        source["name"] = source["type"] = attack
    facts["statistics"]["train"]["rejected"] = {attack: 3}
    facts["statistics"]["rejected_examples"] = [
        {"file": attack, "row": 1, "reason": attack, "detail": attack}
    ]
    page = Page(data_page(facts))
    page.assert_harmless()
    assert page.tags.count(("title", {})) == 1 and tags.count("section") == len(
        [tag for tag, _ in page.tags if tag == "section"]
    )


# -- what is counted ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1 << 20), max_size=60))
def test_lengths_fall_into_their_bins(lengths: list[int]) -> None:
    counts = count("lengths", lengths)
    edges = EDGES["lengths"]
    for index, number in enumerate(counts):
        assert number == sum(edges[index] <= length < edges[index + 1] for length in lengths)
    assert sum(counts) == len(lengths) and (not counts or counts[-1])


def test_full_packs_have_a_bin_of_their_own() -> None:
    found = shard_histograms([90, 10, 99, 500], [(90, 90), (10, 0), (99, 50)], [[0, 1], [2]], 100)
    assert found["pack_fill"] == [0] * 7 + [1, 0, 1] and sum(found["lengths"]) == 4
    assert found["trained_shares"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1] and found["pack_documents"] == [1, 1]


def test_statistics_add_up(base: Path, tmp_path: Path) -> None:
    config, plan = load(write_config(tmp_path, base))
    prepare_all(plan, config.data, base)
    statistics = data_statistics(plan)
    for name, windows in (("train", plan.windows), ("held_out", plan.eval_windows)):
        whole = statistics[name]
        parts = [source[name] for source in statistics["sources"]]
        for key in ("rows", "documents", "packs", "tokens", "targets", "dropped", "prepared_windows"):
            assert whole[key] == sum(part[key] for part in parts)
        assert whole["rows"] == sum(window.num_rows for window in windows)
        histograms = whole["histograms"]
        assert sum(histograms["lengths"]) == whole["documents"] + whole["dropped"]
        assert sum(histograms["trained_shares"]) == whole["documents"]
        assert sum(histograms["pack_fill"]) == sum(histograms["pack_documents"]) == whole["packs"]


def test_the_mix_is_that_of_the_epoch(base: Path, tmp_path: Path) -> None:
    config, plan = load(write_config(tmp_path, base))
    before = epoch_mix(plan, 0)
    assert before["estimated_windows"] == len(plan.windows)
    prepare_all(plan, config.data, base)
    mix = epoch_mix(plan, 0)
    assert mix == epoch_mix(plan, 0) != epoch_mix(plan, 1) and mix["estimated_windows"] == 0
    assert mix["planned_tokens"] == before["planned_tokens"]
    assert len(mix["slices"]) == SLICES
    tokens = np.array(mix["slices"]).sum(axis=0)
    real = [source["train"]["tokens"] for source in data_statistics(plan)["sources"]]
    assert np.abs(tokens - real).max() <= SLICES


def test_token_texts_joined_are_the_text(base: Path) -> None:
    loaded = load_tokenizer(TokenizerSpec(str(base), "tokenizer_default", ()))
    text = "<|im_start|>user\nünï 你好 🎉 a  b<|im_end|>\n"
    ids = np.array(loaded.tokenizer.encode(text).ids, dtype=np.int32)
    tokens = token_texts(Sample(ids, np.zeros(len(ids), dtype=np.uint8)), loaded.tokenizer)
    assert "".join(token.text for token in tokens) == text
    assert [token.text for token in tokens if token.special] == ["<|im_start|>", "<|im_end|>"]
    assert [number for token in tokens for number in token.ids] == ids.tolist()
    assert any(len(token.ids) > 1 for token in tokens), "an emoji takes several tokens"
