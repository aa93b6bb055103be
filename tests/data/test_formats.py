"""Each kind of row: what its text is, what of it is trained, and which rows are refused."""

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from nemo_ray.config.dataset_types import TYPE_KEYS
from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import Encoder
from nemo_ray.data.formats import FORMATS
from nemo_ray.data.prepare import fit
from tests.data.helpers import chats, write_tokenizer
from tests.data.nemotron import UNMARKED, encoder, rejected, samples_of, trained_text, whole_text

END = "<|im_end|>"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that begins each text with <s>."""
    folder = write_tokenizer(tmp_path_factory.mktemp("bos"), UNMARKED)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def both(made: Encoder, row: Any) -> tuple[str, str]:
    """(the single document's text, its trained part)."""
    (sample,) = samples_of(made, row)
    return whole_text(made, sample), trained_text(made, sample)


def test_every_type_has_a_format_and_its_keys() -> None:
    types = get_args(get_type_hints(DatasetSpec)["type"])
    assert set(FORMATS) == set(TYPE_KEYS) == set(types)
    for kind, found in FORMATS.items():
        spec = DatasetSpec(path="x", type=kind)
        assert {field.name for field in found.required(spec)} <= set(found.columns(spec))
        assert set(found.settings(spec)) <= set(DatasetSpec.model_fields) and found.keys == TYPE_KEYS[kind]


# -- alpaca ---------------------------------------------------------------------------------------

ALPACA = {"instruction": "Add {x}.", "input": "3 and 4", "output": "7"}


def test_alpaca_prompts_are_the_known_ones(base: Path) -> None:
    made = encoder(base, type="alpaca")
    text, trained = both(made, ALPACA)
    assert trained == "7" + END
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n3 and 4\n\n### Response:\n7" + END
    )
    for absent in ({"input": ""}, {"input": None}):
        text, trained = both(made, {**ALPACA, **absent})
        assert trained == "7" + END
        assert text == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Response:\n7" + END
        )


def test_alpaca_takes_other_fields_and_words(with_bos: Path) -> None:
    keys = {
        **{"field_instruction": "q", "field_input": "context", "field_output": "a", "field_system": "sys"},
        **{
            "format": "{input}|{instruction}=",
            "no_input_format": "{instruction}=",
            "system_format": "[{system}]",
        },
    }
    made = encoder(with_bos, type="alpaca", system_prompt="S", **keys)
    assert both(made, {"q": "3+4", "a": "7"}) == ("<s>[S]3+4=7" + END, "7" + END)
    assert both(made, {"q": "3+4", "a": "7", "context": "c", "sys": "T"})[0] == "<s>[T]c|3+4=7" + END
    bare = encoder(with_bos, type="alpaca", system_prompt="", **keys)
    assert both(bare, {"q": "3+4", "a": "7"})[0] == "<s>3+4=7" + END
    every = encoder(with_bos, inputs=True, type="alpaca", system_prompt="", **keys)
    assert both(every, {"q": "3+4", "a": "7"})[1] == "<s>3+4=7" + END


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": None}, "no field 'instruction'"),
        ({"instruction": ""}, "field 'instruction' is empty"),
        ({"output": ""}, "field 'output' is empty"),
        ({"output": ["7"]}, "field 'output' is no text"),
        ({"input": 3}, "field 'input' is no text"),
        ({"output": "\ud800"}, "invalid Unicode"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(base: Path, change: dict[str, Any], reason: str) -> None:
    assert rejected(encoder(base, type="alpaca"), {**ALPACA, **change}).reason == reason


# -- prompt and completion ------------------------------------------------------------------------


def test_a_completion_is_trained_with_its_end(with_bos: Path) -> None:
    made = encoder(with_bos, type="prompt_completion")
    assert both(made, {"prompt": "3 + 4 =", "completion": " 7"}) == ("<s>3 + 4 = 7" + END, " 7" + END)
    assert both(made, {"prompt": "", "completion": "7"}) == ("<s>7" + END, "<s>7" + END)
    named = encoder(with_bos, type="prompt_completion", field_prompt="q", field_completion="a")
    assert both(named, {"q": "x", "a": END + "y" + END})[0] == "<s>x" + END + "y" + END, "eos is there once"


def test_a_completion_of_messages_is_a_chat_whose_prompt_is_not_trained(base: Path) -> None:
    made = encoder(base, type="prompt_completion")
    (chat,) = chats(1, turns=2)
    row = {"prompt": chat["messages"][:3], "completion": chat["messages"][3:]}
    (whole,) = samples_of(encoder(base), chat)
    (sample,) = samples_of(made, row)
    assert sample.ids.tolist() == whole.ids.tolist()
    assert trained_text(made, sample) == chat["messages"][3]["content"] + END
    as_text = {name: json.dumps(value) for name, value in row.items()}
    assert (
        samples_of(made, {**as_text, "completion": row["completion"]})[0].ids.tolist() == sample.ids.tolist()
    )
    assert rejected(made, {**row, "completion": row["prompt"][:1]}).reason == "no assistant turn"
    assert rejected(made, {**row, "completion": 3}).reason == "field 'completion' is no list of messages"
    assert rejected(made, {"prompt": row["prompt"], "completion": "x"}).reason == "field 'prompt' is no text"
    every = encoder(base, inputs=True, type="prompt_completion")
    assert samples_of(every, row)[0].targets.all()


def test_only_texts_are_read_without_a_template(tmp_path: Path) -> None:
    made = encoder(write_tokenizer(tmp_path, None), type="prompt_completion")
    assert both(made, {"prompt": "a", "completion": "b"})[1] == "b" + END
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert rejected(made, row).reason == "messages, and no chat template"


# -- segments -------------------------------------------------------------------------------------


def test_segments_are_one_text_and_nothing_is_added(with_bos: Path) -> None:
    made = encoder(with_bos, type="input_output")
    segments = [
        {"label": False, "text": "<s>Q: 3 + 4?\nA:"},
        {"label": True, "text": " 7"},
        {"label": True, "text": "<|im_end|>"},
        {"label": False, "text": "\nQ: more?"},
        {"label": 1, "text": " no"},
    ]
    text, trained = both(made, {"segments": segments})
    assert text == "".join(str(segment["text"]) for segment in segments)
    assert trained == " 7<|im_end|> no"
    assert both(encoder(with_bos, inputs=True, type="input_output"), {"segments": segments})[1] == text
    named = encoder(with_bos, type="input_output", field_segments="parts")
    assert both(named, {"parts": segments})[1] == trained


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.text(alphabet="ab \n7é你", max_size=6)), min_size=1, max_size=6))
def test_segments_encode_as_the_whole_text(base: Path, segments: list[tuple[bool, str]]) -> None:
    """Ids are those of the text; a token is trained if it holds a character of a trained segment."""
    made = encoder(base, type="input_output")
    row = {"segments": [{"label": label, "text": text} for label, text in segments]}
    text = "".join(text for _, text in segments)
    encoding = made.loaded.tokenizer.encode(text, add_special_tokens=False)
    trained = [label for label, part in segments for _ in part]
    wanted = [int(any(trained[start:stop])) for start, stop in encoding.offsets]
    if not any(wanted[1:]):
        assert rejected(made, row).reason == "no trained tokens"
        return
    (sample,) = samples_of(made, row)
    assert sample.ids.tolist() == encoding.ids and sample.targets.tolist() == wanted


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ("x", "field 'segments' is no list of segments"),
        ([], "field 'segments' is no list of segments"),
        (["x"], "a segment is no object"),
        ([{"text": "x"}], "a segment's label is not true or false"),
        ([{"label": "yes", "text": "x"}], "a segment's label is not true or false"),
        ([{"label": True, "text": 3}], "a segment has no text"),
        ([{"label": False, "text": "x"}], "no trained tokens"),
        ([{"label": False, "text": "x"}, {"label": True, "text": ""}], "no trained tokens"),
        ([{"label": True, "text": "\udfff"}], "invalid Unicode"),
    ],
)
def test_segments_that_cannot_be_used(base: Path, segments: Any, reason: str) -> None:
    assert rejected(encoder(base, type="input_output"), {"segments": segments}).reason == reason


# -- token ids ------------------------------------------------------------------------------------


def test_tokens_are_taken_as_they_are(base: Path) -> None:
    made = encoder(base, type="tokenized")
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    (sample,) = samples_of(made, row)
    assert sample.ids.tolist() == [5, 6, 7, 8] and sample.targets.tolist() == [0, 0, 1, 1]
    assert (sample.ids.dtype, sample.targets.dtype) == (np.int32, np.uint8)
    padded = {name: [0, *values, 0, 0] for name, values in row.items()}
    (same,) = samples_of(made, {**padded, "attention_mask": [0, 1, 1, 1, 1, 0, 0]})
    assert same.ids.tolist() == sample.ids.tolist() and same.targets.tolist() == sample.targets.tolist()
    assert samples_of(made, {**row, "attention_mask": None})[0].ids.tolist() == [5, 6, 7, 8]


TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_ids": None}, "no field 'input_ids'"),
        ({"labels": None}, "no field 'labels'"),
        ({"labels": [-100, 6]}, "'labels' is not as long as 'input_ids'"),
        ({"labels": [-100, 6, 8]}, "a label is neither its token's id nor -100"),
        ({"labels": [-1, 6, 7]}, "a label is neither its token's id nor -100"),
        ({"labels": [-100, -100, -100]}, "no trained tokens"),
        ({"labels": [5, -100, -100]}, "no trained tokens"),
        ({"input_ids": [5, 6, 100000]}, "a token id is not in the vocabulary"),
        ({"input_ids": [5, 6, -7]}, "a token id is not in the vocabulary"),
        ({"input_ids": [5, 6, 2**80]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": [5, 6, 7.5]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": [5, 6, None]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": [[5, 6, 7]]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": [True, False, True]}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": []}, "field 'input_ids' is no list of whole numbers"),
        ({"input_ids": "5 6 7"}, "field 'input_ids' is no list of whole numbers"),
        ({"attention_mask": [1, 1]}, "'attention_mask' is not as long as 'input_ids'"),
        ({"attention_mask": [1, 0, 1]}, "'attention_mask' hides tokens between others"),
        ({"attention_mask": [0, 0, 0]}, "'attention_mask' hides every token"),
    ],
)
def test_tokens_that_cannot_be_used(base: Path, change: dict[str, Any], reason: str) -> None:
    assert rejected(encoder(base, type="tokenized"), {**TOKENS, **change}).reason == reason


# -- plain text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "pretrain"])
def test_plain_text_is_trained_whole(with_bos: Path, kind: str) -> None:
    made = encoder(with_bos, type=kind, field="body")
    assert both(made, {"body": "the quick\n"}) == ("<s>the quick\n" + END,) * 2
    assert rejected(made, {"body": ["x"]}).reason == "field 'body' is no text"
    assert rejected(made, {"body": "x\ud83d"}).reason == "invalid Unicode"


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 20))
def test_parts_of_a_long_text_train_each_token_once(base: Path, size: int, length: int) -> None:
    made = encoder(base, type="pretrain")
    (sample,) = samples_of(made, {"text": "7\n" * size})
    parts = fit(sample, length, splits=True, truncate=False)
    assert all(2 <= len(part.ids) <= length for part in parts)
    assert all(len(part.ids) == length for part in parts[:-1])
    # The first token of a document is no target: it is the last one of the part before.
    joined = [*parts[0].ids, *(token for part in parts[1:] for token in part.ids[1:])]
    assert joined == sample.ids.tolist()


# -- chats ----------------------------------------------------------------------------------------

CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": None}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
AGENT = [
    {"role": "user", "content": "sum"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "It is 7."},
]


def called(arguments: Any, **tool_call: Any) -> list[dict[str, Any]]:
    function = {"name": "add", "arguments": arguments}
    return [AGENT[0], {**AGENT[1], "tool_calls": [{"function": function, **tool_call}]}, *AGENT[2:]]


def test_tools_and_calls_may_be_json_text(with_bos: Path) -> None:
    from transformers import AutoTokenizer

    made = encoder(with_bos)
    arguments = {"a": 3, "b": "x"}
    (sample,) = samples_of(made, {"messages": called(arguments), "tools": TOOLS})
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    ids = tokenizer.apply_chat_template(called(arguments), tools=TOOLS, return_dict=False)
    assert sample.ids.tolist() == ids
    text = whole_text(made, sample)
    assert "<parameter=a>\n3\n</parameter>" in text and '"parameters": {"type": "object"}' in text
    inner = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "parameters": '{"type": "object"}'}}]  # type: ignore[dict-item]
    for tools in (json.dumps(TOOLS), [json.dumps(TOOLS[0])], inner):
        for messages in (called(json.dumps(arguments)), json.dumps(called(json.dumps(arguments)))):
            assert samples_of(made, {"messages": messages, "tools": tools})[0].ids.tolist() == ids
    for none in (None, [], "", "[]"):
        assert "parameters" not in both(made, {"messages": called(arguments), "tools": none})[0]
    renamed = encoder(with_bos, field_tools="functions")
    assert samples_of(renamed, {"messages": called(arguments), "functions": TOOLS})[0].ids.tolist() == ids


def test_fields_that_parquet_fills_in_are_left_out(with_bos: Path) -> None:
    made = encoder(with_bos)
    text, _ = both(made, {"messages": AGENT, "tools": None})
    assert "<parameter=a>\n3\n" in text and "parameter=b" not in text
    filled = [
        {"role": None, "content": None, "tool_calls": None, "extra": None, **message} for message in AGENT
    ]
    assert both(made, {"messages": filled, "tools": None})[0] == text


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (called("{"), None, "a tool call's arguments is no JSON"),
        (called("[1]"), None, "a tool call's arguments are no object"),
        (called(""), None, "a tool call's arguments is no JSON"),
        (called({}, function="x"), None, "a tool call has no 'name'"),
        ([AGENT[0], {**AGENT[1], "tool_calls": "x"}], None, "a message's tool_calls is no JSON"),
        ([AGENT[0], {**AGENT[1], "tool_calls": [3]}], None, "a message's tool_calls are no list of calls"),
        (AGENT, "{", "field 'tools' is no JSON"),
        (AGENT, {"name": "x"}, "field 'tools' is no list of tools"),
        (AGENT, [3], "field 'tools' is no list of tools"),
    ],
)
def test_tools_that_cannot_be_used(with_bos: Path, messages: Any, tools: Any, reason: str) -> None:
    assert rejected(encoder(with_bos), {"messages": messages, "tools": tools}).reason == reason


def test_names_roles_and_the_system_field(base: Path) -> None:
    row = {
        "talk": [{"who": "person", "says": "a b"}, {"who": "bot", "says": "c"}],
        "sys": "be kind",
    }
    keys = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"user": ["person"], "assistant": ["bot"]},
    }
    made = encoder(base, field_system="sys", roles_to_train=["bot"], **keys)
    system = "<|im_start|>system\nbe kind<|im_end|>\n"
    text, trained = both(made, row)
    assert text == system + "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    assert trained == "c" + END
    for none in (None, ""):
        assert not both(made, {**row, "sys": none})[0].startswith(system)
    assert rejected(made, {**row, "sys": 3}).reason == "field 'sys' is no text"
    own = {**row, "talk": [{"who": "system", "says": "mine"}, *row["talk"]]}
    assert "mine" in both(made, own)[0] and "be kind" not in both(made, own)[0]
    dropping = encoder(base, field_system="sys", drop_system_message=True, **keys)
    assert both(dropping, own)[0] == both(dropping, row)[0] == text.removeprefix(system)
    only = {"talk": own["talk"][:1]}
    assert rejected(dropping, only).reason == "only a system message, which drop_system_message leaves out"
    assert both(encoder(base), {"messages": chats(1)[0]["messages"], "system": "S"})[0].startswith(
        "<|im_start|>system\nS<|im_end|>"
    ), "axolotl's default"


def test_reasoning_goes_by_several_names(with_bos: Path) -> None:
    made = encoder(with_bos)
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "b", name: "why"}
        assert both(made, {"messages": [AGENT[0], message]})[1] == "why\n</think>\nb" + END
