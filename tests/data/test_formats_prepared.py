"""Formats through the production entries: configuration, plan, shards, packs, and what the command shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nemo_ray.config.load import load_config
from nemo_ray.config.schema import DataSection
from nemo_ray.data.__main__ import main
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.packing import IGNORED
from nemo_ray.data.prepare import dataset_specs
from nemo_ray.data.reader import PackReader
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.data.tokenizer import TokenizerSpec, load_tokenizer
from nemo_ray.errors import ConfigError, DataError
from tests.data.helpers import PLAIN, chats, prepare_all, section, write_lines, write_tokenizer
from tests.data.nemotron import UNMARKED

END = "<|im_end|>"


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("nemotron"), UNMARKED)
    (folder / "config.json").write_text('{"model_type": "nemotron_h"}')
    return folder


def prepared(data: DataSection, base: Path, folder: Path) -> tuple[DataPlan, ShardStats]:
    """The plan, and the statistics of its only window."""
    plan = plan_data(data, str(base), str(folder / "prepared"))
    (stats,) = prepare_all(plan, data, base)
    return plan, stats


def read_back(plan: DataPlan, base: Path) -> list[tuple[int, str, str]]:
    """(row, text, trained text) of every document, as a training run reads them."""
    decode = load_tokenizer(TokenizerSpec(str(base), "tokenizer_default", ())).tokenizer.decode
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=1)
    found = []
    while (step := reader.next_step()) is not None:
        for pack in step.packs:
            stops = np.cumsum(pack.lengths)
            for number, row in enumerate(pack.sample_rows):
                where = slice(stops[number] - pack.lengths[number], stops[number])
                ids, labels = pack.input_ids[where], pack.labels[where]
                texts = [
                    decode(part.tolist(), skip_special_tokens=False) for part in (ids, ids[labels != IGNORED])
                ]
                found.append((int(row), texts[0], texts[1]))
    return sorted(found)


THOUGHTS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "count"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four", "reasoning_content": "again"},
]


def test_a_row_may_become_several_documents(nemotron: Path, tmp_path: Path) -> None:
    rows = [{"messages": THOUGHTS}, {"messages": THOUGHTS[:2]}, {"messages": THOUGHTS[:1]}]
    data = section(write_lines(tmp_path / "rows.jsonl", rows))
    plan, stats = prepared(data, nemotron, tmp_path)
    assert (stats.rows, stats.documents, stats.dropped) == (3, 3, 0)
    assert stats.rejected == {"no assistant turn": 1}
    first = (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\ncount\n</think>\ntwo<|im_end|>\n"
    )
    second = first.replace("<think>\ncount\n</think>\n", "<think></think>") + (
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\nagain\n</think>\nfour<|im_end|>\n"
    )
    assert read_back(plan, nemotron) == sorted(
        [
            (0, first, "count\n</think>\ntwo" + END),
            (0, second, "again\n</think>\nfour" + END),
            (1, first, "count\n</think>\ntwo" + END),
        ]
    )
    assert any("may rewrite earlier turns" in notice for notice in plan.notices)
    lines = "\n".join(describe(data_statistics(plan)))
    assert "train: 3 documents" in lines and "rejected: 1 rows, no assistant turn" in lines


def test_documents_of_a_row_are_dropped_one_by_one(nemotron: Path, tmp_path: Path) -> None:
    long = [*THOUGHTS[:2], {"role": "user", "content": "7 " * 90}, THOUGHTS[3]]
    data = section(write_lines(tmp_path / "rows.jsonl", [{"messages": long}]), sequence_len=100)
    plan, stats = prepared(data, nemotron, tmp_path)
    assert (stats.rows, stats.documents, stats.dropped, stats.num_rejected) == (1, 1, 1, 0)
    assert "1 documents dropped" in "\n".join(describe(data_statistics(plan)))
    assert plan.sources[0].tokens_per_row == stats.tokens


def test_the_command_shows_each_document(
    nemotron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "chats.jsonl", [{"messages": THOUGHTS}])
    write_lines(tmp_path / "alpaca.jsonl", [{"instruction": "Add.", "input": "3 4", "output": "7"}])
    write_lines(tmp_path / "long.jsonl", [{"body": "word " * 300}])
    write_lines(tmp_path / "ids.jsonl", [{"input_ids": [40, 41, 42], "labels": [-100, 41, 42]}])
    keys = {
        "base_model": str(nemotron),
        "datasets": [
            {"path": str(tmp_path / "chats.jsonl")},
            {"path": str(tmp_path / "alpaca.jsonl"), "type": "alpaca"},
            {"path": str(tmp_path / "ids.jsonl"), "type": None},
        ],
        "pretraining_dataset": [{"path": str(tmp_path / "long.jsonl"), "text_column": "body"}],
        "sequence_len": 128,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    assert main([str(tmp_path / "config.yaml"), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "document 1 of 2" in out and "document 2 of 2" in out
    assert "«count" in out and "«again" in out and f"«7{END}»" in out
    assert "longer than sequence_len 128: split" in out
    assert "3 tokens, 2 trained (67%)" in out


def test_long_texts_are_split_where_asked(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{number} seven wizards " * 60} for number in range(5)] + [{"text": "short"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    plan, stats = prepared(section(path, dataset={"type": "pretrain"}), base, tmp_path)
    assert stats.documents > stats.rows == 6 and stats.dropped == stats.truncated == 0
    whole = load_tokenizer(TokenizerSpec.of(section(path), str(base))).tokenizer
    tokens = sum(len(whole.encode(row["text"]).ids) + 1 for row in rows)
    assert stats.targets == tokens - 6, "each token but a text's first is trained once"
    assert plan.estimated_tokens(plan.windows) == pytest.approx(stats.tokens)
    kept, _ = prepared(section(path, dataset={"type": "completion"}), base, tmp_path)
    assert kept.windows[0].key != plan.windows[0].key
    assert [text for _, text, _ in read_back(kept, base)] == ["short" + END]


def test_each_dataset_has_its_template_and_arguments(nemotron: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text(PLAIN)
    rows = str(write_lines(tmp_path / "rows.jsonl", [{"messages": THOUGHTS}]))
    keys = {
        "base_model": str(nemotron),
        "sequence_len": 256,
        "chat_template_kwargs": {"truncate_history_thinking": False},
        "datasets": [
            {"path": rows},
            {"path": rows, "chat_template": str(tmp_path / "plain.jinja")},
            {"path": rows, "chat_template_kwargs": {"truncate_history_thinking": True}},
        ],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    data = load_config(str(tmp_path / "config.yaml")).config.data
    plan = plan_data(data, str(nemotron), str(tmp_path / "prepared"))
    prepare_all(plan, data, nemotron)
    texts = [text for _, text, _ in read_back(plan, nemotron)]
    assert len(texts) == 4, "the last dataset's row is two documents"
    assert sum("<think>\ncount" in text and "<think>\nagain" in text for text in texts) == 1
    assert sum("<think>" not in text for text in texts) == 1


# -- parquet, and files that differ ---------------------------------------------------------------


def test_rows_of_parquet_read_like_those_of_json(nemotron: Path, tmp_path: Path) -> None:
    """Parquet gives every message and every call all the fields that any of them has."""
    call = {"function": {"name": "add", "arguments": {"a": "3"}}}
    other = {"function": {"name": "mul", "arguments": {"b": "4"}}}
    rows = [
        {
            "messages": [
                THOUGHTS[0],
                {"role": "assistant", "content": "", "tool_calls": [call, other]},
                {"role": "tool", "content": "7"},
                THOUGHTS[1],
            ]
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_lines(tmp_path / "rows.jsonl", rows)
    found = []
    for name in ("rows.parquet", "rows.jsonl"):
        plan, _ = prepared(
            section(tmp_path / name, sequence_len=512), nemotron, tmp_path / name.replace(".", "-")
        )
        found.append(read_back(plan, nemotron))
    assert found[0] == found[1] and "<parameter=a>\n3\n" in found[0][0][1]
    assert "parameter=b" not in found[0][0][1].split("mul")[0]


def test_tokenized_parquet(base: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [40, 41, 42, 0], "labels": [-100, 41, 42, -100], "attention_mask": [1, 1, 1, 0]}
    ] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    plan, stats = prepared(section(tmp_path / "rows.parquet", dataset={"type": "tokenized"}), base, tmp_path)
    assert (stats.documents, stats.tokens, stats.targets) == (3, 9, 6)
    assert stats.rejected == {}


def test_a_column_of_other_type_in_another_file(base: Path, tmp_path: Path) -> None:
    """JSON text of messages is read as messages; what cannot be read is counted by its reason."""
    (chat,) = chats(1, words=4)
    write_lines(tmp_path / "in/a.jsonl", [chat] * 20)
    write_lines(tmp_path / "in/b.jsonl", [{"messages": json.dumps(chat["messages"])}] * 20)
    write_lines(tmp_path / "in/c.jsonl", [{"messages": {"role": "user"}}, {"messages": "hello"}])
    table = pa.Table.from_pylist([{"messages": json.dumps(chat["messages"])}] * 4)
    pq.write_table(table, tmp_path / "in/d.parquet")
    plan, stats = prepared(section(tmp_path / "in"), base, tmp_path)
    assert stats.documents == 44
    assert stats.rejected == {"field 'messages' is no JSON": 1, "field 'messages' is no list of messages": 1}
    assert len({text for _, text, _ in read_back(plan, base)}) == 1


# -- what a shard depends on ----------------------------------------------------------------------

SHAPING: list[dict[str, Any]] = [
    {"message_property_mappings": {"role": "role", "content": "content", "x": "y"}},
    {"roles": {"user": ["user"]}},
    {"field_tools": "other"},
    {"field_system": "other"},
    {"drop_system_message": True},
    {"roles_to_train": ["user"]},
    {"train_on_eos": "none"},
    {"train_on_eot": "none"},
    {"message_field_training": "train"},
    {"message_field_training_detail": "parts"},
    {"chat_template_kwargs": {"x": 1}},
    {"eot_tokens": ["<|im_end|>"]},
    {"type": "prompt_completion"},
]


def test_every_key_that_shapes_samples_is_in_the_shards_key(base: Path, tmp_path: Path) -> None:
    (chat,) = chats(1)
    row = {**chat, "prompt": chat["messages"][:1], "completion": chat["messages"][1:2]}
    path = write_lines(tmp_path / "rows.jsonl", [row])

    def key(**entry: Any) -> str:
        return plan_data(section(path, dataset=entry), str(base), str(tmp_path)).windows[0].key

    keys = [key(), *(key(**entry) for entry in SHAPING)]
    assert len(set(keys)) == len(keys)
    assert key(field_output="x", format="{instruction}") == key(), "keys of another type change nothing"
    top = section(path, chat_template_kwargs={"x": 1})
    assert plan_data(top, str(base), str(tmp_path)).windows[0].key == key(chat_template_kwargs={"x": 1})
    assert dataset_specs(top)[0].chat_template_kwargs == {"x": 1}


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "dataset", "error", "message"),
    [
        ({"mesages": [1]}, {}, ConfigError, r"field_messages: no row .*; did you mean 'mesages'\?"),
        (
            {"conversations": [1]},
            {},
            ConfigError,
            r"; is it field_messages: conversations, with message_prop",
        ),
        ({"input_ids": [1], "labels": [1]}, {}, ConfigError, r"; is it type: tokenized\?"),
        ({"prompt": "a", "completion": "b"}, {}, ConfigError, r"; is it type: prompt_completion\?"),
        ({"instruction": "a", "output": "b"}, {}, ConfigError, r"; is it type: alpaca\?"),
        ({"segments": [1]}, {}, ConfigError, r"; is it type: input_output\?"),
        ({"text": "a"}, {}, ConfigError, r"; is it type: completion\?"),
        (
            {"instruction": "a", "outptu": "b"},
            {"type": "alpaca"},
            ConfigError,
            r"field_output: .*mean 'outptu'\?",
        ),
        ({"input_ids": [1]}, {"type": "tokenized"}, ConfigError, r"datasets\[0\].type: no row .*'labels'"),
        (
            {"input_ids": [9, 9], "labels": [1, 2]},
            {"type": "tokenized"},
            DataError,
            r"label 1 of token 9 at 0",
        ),
        ({"segments": []}, {"type": "input_output"}, DataError, "is no list of segments"),
        (
            {"messages": [1]},
            {"train_on_eos": "all", "eot_tokens": ["<nope>"]},
            ConfigError,
            "eot_tokens: '<nope>'",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    base: Path, tmp_path: Path, row: Any, dataset: Any, error: type[Exception], message: str
) -> None:
    jsonl = write_lines(tmp_path / "rows.jsonl", [row] * 3)
    with pytest.raises(error, match=message):
        plan_data(section(jsonl, dataset=dataset), str(base), str(tmp_path))
    if error is ConfigError and "eot_tokens" not in dataset:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
        with pytest.raises(error, match=message.replace("no row", ".*")):
            plan_data(section(tmp_path / "rows.parquet", dataset=dataset), str(base), str(tmp_path))
