"""Keys that say what rows hold: axolotl's spellings, rules between them, and keys of another type."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.helpers import Keys, errors_of, load


def entry(world: Keys, **keys: Any) -> Keys:
    """The world with more keys in its dataset's entry."""
    (spec,) = world["datasets"]
    return world | {"datasets": [spec | keys]}


def test_axolotls_keys_of_a_chat_run_as_they_are(world: Keys, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    keys = {
        "chat_template": "jinja",
        "chat_template_jinja": str(tmp_path / "mine.jinja"),
        "field_thinking": "thought",
        "template_thinking_key": "reasoning_content",
        "roles": {"assistant": ["gpt", "model"], "user": "human"},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
        "train_on_eot": "turn",
        "message_field_training": "train",
        "message_field_training_detail": "train_detail",
        "field_tools": "tools",
        "drop_system_message": False,
    }
    loaded = load(entry(world, **keys) | {"eot_tokens": ["<|im_end|>"], "chat_template_kwargs": {"x": False}})
    (spec,) = loaded.config.datasets
    assert loaded.notices == ()
    assert spec.chat_template == str(tmp_path / "mine.jinja")
    assert spec.message_property_mappings["reasoning_content"] == "thought"
    assert spec.message_property_mappings["content"] == "content"
    assert spec.roles == {"assistant": ("gpt", "model"), "user": ("human",)}
    assert loaded.config.chat_template_kwargs == {"x": False} and loaded.config.eot_tokens == ("<|im_end|>",)


def test_template_arguments_are_the_same_in_every_process(world: Keys) -> None:
    config = load(world, "chat_template_kwargs={day: 2026-11-24, n: [1, {a: b}], x: 1.5}").config
    assert config.chat_template_kwargs == {"day": "2026-11-24", "n": [1, {"a": "b"}], "x": 1.5}


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_type_means_token_ids(world: Keys, empty: str | None) -> None:
    assert load(entry(world, type=empty)).config.datasets[0].type == "tokenized"
    assert load(world).config.datasets[0].type == "chat_template"


def test_a_prompt_of_ones_own_is_alpaca_in_other_words(world: Keys) -> None:
    own = {"field_instruction": "q", "field_output": "a", "format": "{instruction}", "system_prompt": "S"}
    (spec,) = load(entry(world, type=own)).config.datasets
    assert (spec.type, spec.field_instruction, spec.field_output, spec.format) == (
        "alpaca",
        "q",
        "a",
        "{instruction}",
    )
    assert (spec.system_prompt, spec.system_format, spec.field_system) == ("S", "{system}", "system")
    assert spec.no_input_format == "{instruction} ", "axolotl's default"
    (line,) = errors_of(entry(world, type=own | {"fromat": "x"}))
    assert line.startswith("datasets.0.type.fromat: unknown key")


@pytest.mark.parametrize("listed", [True, False])
def test_pretraining_dataset_is_a_dataset(world: Keys, listed: bool) -> None:
    path = world["datasets"][0]["path"]
    given = {"path": path, "text_column": "body", "split": "train", "type": "pretrain", "skip": 0}
    loaded = load(world | {"datasets": None, "pretraining_dataset": [given] if listed else given})
    (spec,) = loaded.config.datasets
    assert (spec.path, spec.type, spec.field, spec.split) == (path, "pretrain", "body", "train")
    both = load(world | {"pretraining_dataset": path}).config
    assert [spec.type for spec in both.datasets] == ["chat_template", "pretrain"]


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ([{"path": "PATH", "skip": 5}], "datasets.0.skip: 5 is refused"),
        (
            [{"path": "PATH", "type": "completion"}],
            "pretraining_dataset.0.type: 'completion' is not pretrain",
        ),
        ([3], "pretraining_dataset.0: 3 is not valid"),
        ([{"path": "gone.jsonl"}], "datasets.0.path: gone.jsonl does not exist"),
    ],
)
def test_a_pretraining_dataset_that_cannot_run(world: Keys, given: Any, start: str) -> None:
    path = world["datasets"][0]["path"]
    if isinstance(given[0], dict) and given[0]["path"] == "PATH":
        given = [given[0] | {"path": path}]
    lines = errors_of(world | {"datasets": None, "pretraining_dataset": given})
    assert lines[0].startswith(start), lines


@pytest.mark.parametrize(
    ("keys", "top", "start"),
    [
        ({"chat_template": "chatml"}, {}, "datasets.0.chat_template: chatml is not a file"),
        ({"chat_template": "gone.jinja"}, {}, "datasets.0.chat_template: gone.jinja is not a file"),
        (
            {"chat_template_kwargs": {"tools": []}},
            {},
            "datasets.0.chat_template_kwargs.tools: is set for each row",
        ),
        ({}, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages: is set for each row"),
        ({"roles": {"a": ["x"], "b": ["x"]}}, {}, "datasets.0.roles: x stands for two roles"),
        ({"roles_to_train": []}, {}, "datasets.0.roles_to_train: [] trains nothing"),
        ({"roles_to_train": ["user"]}, {"train_on_inputs": True}, "datasets.0.roles_to_train: contradicts"),
        ({"train_on_eos": "turn", "train_on_eot": "all"}, {}, "datasets.0.train_on_eot: all contradicts"),
        ({"train_on_eos": "sometimes"}, {}, "datasets.0.train_on_eos: sometimes is not valid"),
        ({"type": "alpaca", "format": "{question}"}, {}, "datasets.0.format: {question} names question"),
        (
            {"type": "alpaca", "no_input_format": "{input}"},
            {},
            "datasets.0.no_input_format: {input} names input",
        ),
        ({"type": "alpaca", "format": "{"}, {}, "datasets.0.format: { cannot be filled in"),
        ({"type": "alpaca.load"}, {}, "datasets.0.type: alpaca.load is not valid"),
        ({"template_thinking_key": "thought"}, {}, "datasets.0.template_thinking_key: thought is refused"),
        ({}, {"roles_to_train": ["user"]}, 'roles_to_train: ["user"] is refused: what is trained is said'),
    ],
)
def test_what_contradicts_itself_is_one_line(world: Keys, keys: Any, top: Any, start: str) -> None:
    (line,) = errors_of(entry(world, **keys) | top)
    assert line.startswith(start)


def test_keys_of_another_type_get_one_line(world: Keys) -> None:
    (line,) = load(entry(world, type="alpaca", field="x", roles_to_train=["user"])).notices
    assert line == "datasets.0.field, datasets.0.roles_to_train: not read by type: alpaca"
    assert load(entry(world, type="alpaca", field_output="x", eot_tokens=["a"])).notices == ()
