"""Which turns of a chat are trained, and on which text: against what transformers renders and masks."""

from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.data.encode import Encoder
from nemo_ray.data.template import RowError, chat_template
from tests.data.helpers import MARKED as CHATML
from tests.data.helpers import PLAIN, write_tokenizer
from tests.data.nemotron import MARKED, UNMARKED, encoder, rejected, samples_of, trained_text, whole_text

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nemotron")
    templates = {"unmarked": UNMARKED, "marked": MARKED, "plain": PLAIN, "chatml": CHATML}
    return {name: write_tokenizer(folder / name, text) for name, text in templates.items()}


@lru_cache(maxsize=8)
def of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def text_of(folder: Path, messages: Messages, prompt: bool = False, **arguments: Any) -> str:
    tokenizer = of_transformers(folder)
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)
    )


def mask_of(folder: Path, messages: Messages, **arguments: Any) -> tuple[list[int], list[int]]:
    out = of_transformers(folder).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **arguments
    )
    return out["input_ids"], out["assistant_masks"]


def assistant(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
AGENT = [
    user("sum it"),
    assistant("", "a tool will do", tool_calls=[CALL]),
    {"role": "tool", "content": "7"},
    assistant("It is 7.", "easy now"),
    user("and more?"),
    assistant("No more.", "nothing left"),
]

words = st.text(alphabet="ab \n<>7é", max_size=12)
# A blank line at its beginning would share a token with the prompt's end.
answers = st.builds(assistant, words, st.none() | words.map(str.strip))
tools = st.builds(lambda content: {"role": "tool", "content": content}, words)
conversations = st.lists(st.one_of(st.builds(user, words), answers, tools), max_size=7).flatmap(
    lambda messages: st.builds(lambda last: [user("first"), *messages, last], answers)
)


def expected(folder: Path, messages: Messages, **arguments: Any) -> tuple[list[str], list[str]]:
    """(texts of the documents, trained text of each turn), from transformers' renderings alone."""
    texts: list[str] = []
    trained = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = text_of(folder, messages[: index + 1], **arguments)
        header = len(commonprefix([text_of(folder, messages[:index], True, **arguments), text]))
        trained.append(text[header:].removesuffix("\n"))
        if texts and text.startswith(texts[-1]):
            texts.pop()
        texts.append(text)
    return texts, trained


@settings(deadline=None, max_examples=100)
@given(conversations)
def test_documents_are_what_would_be_served(folders: dict[str, Path], messages: Messages) -> None:
    """Each answer is trained once, behind the text that the template writes when it is asked for."""
    folder = folders["unmarked"]
    made = encoder(folder)
    samples = samples_of(made, {"messages": messages})
    texts, trained = expected(folder, messages)
    assert [whole_text(made, sample) for sample in samples] == texts
    assert "".join(trained_text(made, sample) for sample in samples) == "".join(trained)
    for sample, text in zip(samples, texts, strict=True):
        assert sample.ids.tolist() == made.loaded.tokenizer.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=60)
@given(conversations)
def test_marked_documents_equal_transformers_mask(folders: dict[str, Path], messages: Messages) -> None:
    """The last turn of each document is masked as transformers masks the chat that ends with it."""
    folder = folders["marked"]
    samples = samples_of(encoder(folder), {"messages": messages})
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    texts, _ = expected(folder, messages)
    masks = {
        text_of(folder, messages[: index + 1]): mask_of(folder, messages[: index + 1]) for index in turns
    }
    count = 0
    for sample, text in zip(samples, texts, strict=True):
        ids, mask = masks[text]
        assert sample.ids.tolist() == ids
        first = int(sample.targets.argmax())
        assert sample.targets.tolist() == [0] * first + mask[first:], "earlier turns are not trained again"
        count += sum(a > b for a, b in zip(sample.targets, [0, *sample.targets[:-1]], strict=True))
    assert count == len(turns)


@pytest.mark.parametrize("name", ["marked", "unmarked"])
def test_history_kept_is_one_document(folders: dict[str, Path], name: str) -> None:
    arguments = {"truncate_history_thinking": False}
    made = encoder(folders[name], chat_template_kwargs=arguments)
    (sample,) = samples_of(made, {"messages": AGENT})
    ids, mask = mask_of(folders["marked"], AGENT, **arguments)
    assert sample.ids.tolist() == ids
    if name == "marked":
        assert sample.targets.tolist() == mask
    assert trained_text(made, sample).count("</think>") == 3
    dropping = samples_of(encoder(folders[name]), {"messages": AGENT})
    assert len(dropping) == 2, "the tool's answer starts no new turn of the user"
    assert "easy now" not in whole_text(made, dropping[1]) and "easy now" in whole_text(made, dropping[0])


def test_the_generation_prompt_follows_the_arguments(folders: dict[str, Path]) -> None:
    made = encoder(folders["unmarked"], chat_template_kwargs={"enable_thinking": False})
    (sample,) = samples_of(made, {"messages": [user("a"), assistant("b")]})
    assert trained_text(made, sample) == "b<|im_end|>"


# -- which turns ----------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be brief"},
    user("one "),
    assistant(" two"),
    user("three"),
    assistant("four"),
]


def chosen(made: Encoder, messages: Messages) -> list[str]:
    """The trained stretches of the single document."""
    (sample,) = samples_of(made, {"messages": messages})
    ids, targets = sample.ids.tolist(), sample.targets.tolist()
    found, start = [], 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or targets[stop] != targets[start]:
            if targets[start]:
                found.append(made.loaded.tokenizer.decode(ids[start:stop], skip_special_tokens=False))
            start = stop
    return found


END = "<|im_end|>"


@pytest.mark.parametrize("name", ["plain", "chatml"])
@pytest.mark.parametrize(
    ("keys", "result"),
    [
        ({}, [" two" + END, "four" + END]),
        ({"roles_to_train": ["user"]}, ["one " + END, "three" + END]),
        ({"roles_to_train": ["human", "system"]}, ["be brief" + END, "one " + END, "three" + END]),
        ({"train_on_eos": "turn"}, [" two" + END, "four" + END]),
        ({"train_on_eos": "none"}, [" two", "four"]),
        ({"train_on_eot": "none"}, [" two", "four"]),
        ({"train_on_eos": "last"}, [" two", "four" + END]),
        ({"train_on_eos": "all"}, [END, END, " two" + END, END, "four" + END]),
        ({"train_on_eos": "none", "roles_to_train": ["user"]}, ["one ", "three"]),
        ({"eot_tokens": ["<|im_start|>"], "train_on_eos": "none"}, [" two", "four"]),
        ({"drop_system_message": True}, [" two" + END, "four" + END]),
    ],
)
def test_roles_and_end_tokens(
    folders: dict[str, Path], name: str, keys: dict[str, Any], result: list[str]
) -> None:
    made = encoder(folders[name], **keys)
    assert chosen(made, CHAT) == result
    (sample,) = samples_of(made, {"messages": CHAT})
    assert ("be brief" in whole_text(made, sample)) != ("drop_system_message" in keys)


@settings(deadline=None, max_examples=60)
@given(conversations)
def test_every_role_may_be_trained_where_history_is_rewritten(
    folders: dict[str, Path], messages: Messages
) -> None:
    """Each turn is trained once, in the text that the template writes for the chat up to it."""
    messages = [{**message, "content": message["content"].strip()} for message in messages]
    folder = folders["unmarked"]
    made = encoder(folder, roles_to_train=["user", "assistant", "tool"])
    samples = samples_of(made, {"messages": messages})
    renderings = [text_of(folder, messages[: count + 1]) for count in range(len(messages))]
    assert all(whole_text(made, sample) in renderings for sample in samples)
    answers = iter(expected(folder, messages)[1])
    wanted = [
        next(answers) if message["role"] == "assistant" else message["content"] + END for message in messages
    ]
    # A tool's answer is followed by a tag, so its end token is no part of it.
    wanted = [
        text.removesuffix(END) if message["role"] == "tool" else text
        for message, text in zip(messages, wanted, strict=True)
    ]
    assert "".join(trained_text(made, sample) for sample in samples) == "".join(wanted)


def test_a_templates_marks_may_leave_out_the_end_token(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %} <|im_end|>"
        "{% endfor %}"
    )
    folder = write_tokenizer(tmp_path, template)
    assert chosen(encoder(folder), CHAT) == [" two", "four"]
    assert chosen(encoder(folder, train_on_eos="turn"), CHAT) == [" two", END, "four", END]
    assert chosen(encoder(folder, eot_tokens=[END]), CHAT) == [" two", END, "four", END]
    assert chosen(encoder(folder, train_on_eos="last"), CHAT) == [" two", "four", END]


@pytest.mark.parametrize("name", ["plain", "chatml", "unmarked", "marked"])
def test_a_message_says_whether_it_is_trained(folders: dict[str, Path], name: str) -> None:
    flags = [None, True, False, None, None]
    messages = [
        message if flag is None else {**message, "learn": flag}
        for message, flag in zip(CHAT, flags, strict=True)
    ]
    made = encoder(folders[name], message_field_training="learn")
    (sample,) = samples_of(made, {"messages": messages})
    text = trained_text(made, sample)
    assert text.startswith("one " + END) and text.endswith("four" + END) and "two" not in text
    only = encoder(folders[name], message_field_training="learn", roles_to_train=[])
    assert chosen(only, messages) == ["one " + END]
    assert rejected(only, {"messages": CHAT}).reason == "no trained tokens"
    assert len(chosen(encoder(folders[name]), messages)) == 2, "without the key the field says nothing"
    wrong = [*CHAT[:4], {**CHAT[4], "learn": "yes"}]
    assert rejected(made, {"messages": wrong}).reason == "a message's 'learn' is not true or false"


@pytest.mark.parametrize("name", ["plain", "chatml", "unmarked", "marked"])
def test_parts_of_a_turn_are_trained_to_the_character(folders: dict[str, Path], name: str) -> None:
    parts = [
        {"begin_offset": 0, "end_offset": 2, "train": False},
        {"begin_offset": 3, "end_offset": 5, "train": True},
    ]
    messages = [user("q"), {**assistant("7" * 3 + "\n\n\n" + "7" * 3, "why"), "parts": parts}]
    made = encoder(folders[name], message_field_training_detail="parts")
    assert chosen(made, messages) == ["\n\n\n", END]
    inline = [user("q"), assistant("", "why")]
    inline[1]["content"] = [
        {"type": "text", "text": "777", "train": False},
        {"type": "text", "text": "\n\n\n", "weight": 1},
        {"type": "text", "text": "777", "weight": 0},
    ]
    assert chosen(encoder(folders[name]), inline) == ["\n\n\n", END]


@settings(deadline=None, max_examples=80)
@given(st.text(alphabet="ab \n7é<", min_size=1, max_size=20), st.data())
def test_any_part_is_found(folders: dict[str, Path], content: str, data: st.DataObject) -> None:
    """The trained tokens are those that hold a character of the part, and the end of the turn."""
    first = data.draw(st.integers(0, len(content) - 1))
    last = data.draw(st.integers(first, len(content) - 1))
    part = {"begin_offset": first, "end_offset": last, "train": True}
    made = encoder(folders["plain"], message_field_training_detail="parts")
    messages = [user("q"), {**assistant(content), "parts": [part]}]
    (sample,) = samples_of(made, {"messages": messages})
    text = text_of(folders["plain"], messages)
    encoding = made.loaded.tokenizer.encode(text, add_special_tokens=False)
    start = text.index("assistant\n") + len("assistant\n")
    wanted = [a < start + last + 1 and b > start + first for a, b in encoding.offsets]
    end = [content_end(text, a, b) for a, b in encoding.offsets]
    assert sample.ids.tolist() == encoding.ids
    assert sample.targets.tolist() == [int(a or b) for a, b in zip(wanted, end, strict=True)]


def content_end(text: str, start: int, stop: int) -> bool:
    """Is this the end token of the last turn?"""
    return text[start:stop] == END and stop == len(text.rstrip())


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ("x", "a message's parts is no JSON"),
        ({}, "a message's parts are no list"),
        ([1], "a part of a message is no object"),
        ([{"train": True}], "a part of a message has no 'begin_offset' and 'end_offset'"),
        (
            [{"begin_offset": 2, "end_offset": 4, "train": True}],
            "a part of a message is not within its content",
        ),
        ([{"begin_offset": 0, "end_offset": 1}], "a part's 'train' is not true or false"),
        ([{"begin_offset": 0, "end_offset": 1, "train": x} for x in (0, 1)], "parts of a message overlap"),
        ([{"begin_offset": 0, "end_offset": 1, "train": False}], "no trained tokens"),
    ],
)
def test_parts_that_cannot_be_used(folders: dict[str, Path], parts: Any, reason: str) -> None:
    made = encoder(folders["plain"], message_field_training_detail="parts")
    row = {"messages": [user("q"), {**assistant("four"), "parts": parts}]}
    assert rejected(made, row).reason == reason


def test_a_part_whose_text_the_template_changes_is_refused(tmp_path: Path) -> None:
    template = PLAIN.replace("message['content']", "(message['content'] | upper)")
    made = encoder(write_tokenizer(tmp_path, template), roles_to_train=["user"])
    changing = PLAIN.replace("message['content']", "(message['content'] | length | string)")
    counting = encoder(write_tokenizer(tmp_path / "b", changing), roles_to_train=["user"])
    assert chosen(made, CHAT) == ["ONE " + END, "THREE" + END]
    assert rejected(counting, {"messages": CHAT}).reason == "the template changes a trained turn's text"


# -- what the template's source shows ---------------------------------------------------------------


@pytest.mark.parametrize("character", ["\ufdd0", "\ufdd1", "\ufdd4"])
@pytest.mark.parametrize("name", ["plain", "chatml", "unmarked", "marked"])
def test_a_row_with_a_mark_in_it_is_refused_or_read_right(
    folders: dict[str, Path], name: str, character: str
) -> None:
    messages = [user(f"a{character}b"), assistant("c")]
    (result,) = encoder(folders[name]).encode([{"messages": messages}])
    if isinstance(result, RowError):
        assert result.reason == "the chat template's marks are broken"
    else:
        (sample,) = result
        assert character == "\ufdd4" and character in whole_text(encoder(folders[name]), sample)


def test_what_stands_before_a_turn_needs_no_mark_of_the_prompt(tmp_path: Path) -> None:
    """The same turns are found where the template's source does not show where its prompt begins."""
    folder = write_tokenizer(tmp_path, UNMARKED + "{% if add_generation_prompt is defined %}{% endif %}")
    for messages in (AGENT, CHAT):
        made = encoder(folder)
        texts = [trained_text(made, sample) for sample in samples_of(made, {"messages": messages})]
        assert "".join(texts) == "".join(expected(folder, messages)[1])


@settings(deadline=None, max_examples=50)
@given(conversations)
def test_what_is_known_to_append_does(messages: Messages) -> None:
    for text in (CHATML, PLAIN):
        template = chat_template(text, {})
        whole = template.render(messages)
        assert all(whole.startswith(template.render(messages[:count])) for count in range(1, len(messages)))


def test_one_rendering_is_enough_where_the_template_appends(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_ray.data.turns._Walk", None)
    assert len(chosen(encoder(folders["chatml"]), CHAT)) == 2
