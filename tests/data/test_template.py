"""Ids and masks against transformers' own, which is the reference."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import Encoder, Sample
from nemo_ray.data.formats import format_of
from nemo_ray.data.masks import Masker
from nemo_ray.data.template import Rendered, RowError
from nemo_ray.data.tokenizer import TOKENIZER_DEFAULT, TokenizerSpec, load_tokenizer
from nemo_ray.errors import ConfigError
from tests.data.helpers import PLAIN, chats, write_tokenizer


def encoder(folder: Path, template: str = TOKENIZER_DEFAULT, inputs: bool = False, **spec: Any) -> Encoder:
    loaded = load_tokenizer(TokenizerSpec(str(folder), template, ()))
    entry = DatasetSpec.model_validate({"path": "x", **spec})
    return Encoder(loaded, format_of(entry).reader(entry, loaded, inputs))


def one(result: list[list[Sample] | RowError]) -> Sample:
    assert not isinstance(result[0], RowError), result[0]
    (sample,) = result[0]
    return sample


def reason(result: list[list[Sample] | RowError]) -> str:
    assert isinstance(result[0], RowError)
    return result[0].reason


def reference(folder: Path, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


contents = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" \n\tab<|>é你🙂", max_size=30),
    st.sampled_from(["", "\n\nx", " <|im_end|> inside", "<|im_start|>", "a<s>b", "\u0301combining"]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
def test_ids_and_mask_equal_transformers(base: Path, turns: list[tuple[str, str]]) -> None:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, mask = reference(base, messages)
    sample = one(encoder(base).encode([{"messages": messages}]))
    assert sample.ids.tolist() == ids
    assert sample.targets.tolist() == mask


CONTENT = "{% generation %}{{ m.content }}{% endgeneration %}"
MERGING = "{% for m in messages %}{{ m.role + ':' }}" + CONTENT + "{{ ';' }}{% endfor %}"
HEADERLESS = (
    "{% for m in messages %}<s>{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}<|im_start|>{{ m.role }} " + CONTENT + "<|im_end|>{% endfor %}"


@pytest.mark.parametrize("template", [MERGING, HEADERLESS, ENDLESS])
def test_marks_away_from_special_tokens(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path, template)
    for row in chats(20, seed=3):
        ids, mask = reference(folder, row["messages"])
        sample = one(encoder(folder).encode([row]))
        assert (sample.ids.tolist(), sample.targets.tolist()) == (ids, mask)


def test_a_token_across_a_mark_is_a_target(tmp_path: Path) -> None:
    # "the" is one token: the mark begins inside it.
    folder = write_tokenizer(tmp_path, "{% for m in messages %}t" + CONTENT + "{% endfor %}")
    row = [{"role": "assistant", "content": "he quick"}]
    ids, mask = reference(folder, row)
    sample = one(encoder(folder).encode([{"messages": row}]))
    assert len(ids) == 2
    assert (sample.ids.tolist(), sample.targets.tolist()) == (ids, mask) == (ids, [1, 1])


def test_offsets_trimmed_by_the_tokenizer_do_not_move_the_mask(tmp_path: Path) -> None:
    # transformers loses a turn here, and all after it: its offsets leave out the answer's first blank.
    plain, trimming = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", trim_offsets=True)
    row = {"messages": [{"role": "assistant", "content": "  quick"}]}
    samples = [one(encoder(folder).encode([row])) for folder in (plain, trimming)]
    assert samples[0].targets.tolist() == samples[1].targets.tolist() == reference(plain, row["messages"])[1]


def test_without_marks_targets_are_what_an_answer_adds(tmp_path: Path, base: Path) -> None:
    folder = write_tokenizer(tmp_path, PLAIN)
    for row in chats(10, seed=5, turns=3):
        plain, marked = one(encoder(folder).encode([row])), one(encoder(base).encode([row]))
        assert plain.ids.tolist() == marked.ids.tolist()
        assert plain.targets.tolist() == marked.targets.tolist()


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think></think>' if loop.last or not DROP else '' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def test_a_header_is_the_generation_prompt_as_far_as_it_agrees(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, THINKING.replace("DROP", "false"))
    made = encoder(folder)
    sample = one(made.encode(chats(1, turns=2)))
    trained = made.loaded.tokenizer.decode(
        sample.ids[sample.targets == 1].tolist(), skip_special_tokens=False
    )
    assert trained.count("</think>0 ") == 1 and trained.count("</think>1 ") == 1
    assert "<think>" not in trained and "assistant" not in trained and trained.endswith("<|im_end|>")


COUNTING = "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_never_writes_a_beginning_is_refused_by_name(tmp_path: Path, marked: bool) -> None:
    content = "{% generation %}{{ m.content }}{% endgeneration %}" if marked else "{{ m.content }}"
    made = encoder(write_tokenizer(tmp_path, COUNTING.replace("{{ m.content }}", content)))
    rejected = made.encode(chats(1, turns=2))[0]
    assert isinstance(rejected, RowError)
    assert (rejected.reason, rejected.detail) == ("the template rewrites earlier turns", "at message 1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, "no field 'messages'"),
        ([1], "the row is no object"),
        ({"messages": []}, "field 'messages' is no list of messages"),
        ({"messages": 3}, "field 'messages' is no list of messages"),
        ({"messages": '"hi"'}, "field 'messages' is no list of messages"),
        ({"messages": [{"content": "x"}]}, "a message has no 'role'"),
        ({"messages": [{"role": "assistant"}]}, "a message has no 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "\ufdd0"}]}, "the chat template's marks are broken"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "invalid Unicode"),
        (
            {"messages": [{"role": "assistant", "content": [1]}]},
            "a message's content has a part that is no text",
        ),
        ({"messages": [{"role": "assistant", "content": 3}]}, "a message's content is no text"),
        ({"messages": [{"role": "", "content": "x"}]}, "a message has no 'role'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "a message has no 'role'"),
        ({"messages": "[{"}, "field 'messages' is no JSON"),
    ],
)
def test_rows_that_cannot_be_used(base: Path, row: Any, expected: str | None) -> None:
    result = encoder(base).encode([row, *chats(1)])
    assert not isinstance(result[1], RowError), "a bad row must not take its neighbours with it"
    assert (result[0].reason if isinstance(result[0], RowError) else None) == expected


def test_a_template_that_raises_is_a_reason_with_its_message(tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    rejected = encoder(write_tokenizer(tmp_path / "base"), str(template)).encode(chats(1))[0]
    assert isinstance(rejected, RowError)
    assert rejected.reason == "the chat template fails" and "roles must alternate" in rejected.detail


def test_details_can_always_be_printed(tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('not ' + messages[0].content) }}")
    row = {"messages": [{"role": "assistant", "content": "\ud83d"}]}
    rejected = encoder(write_tokenizer(tmp_path / "base"), str(template)).encode([row])[0]
    assert isinstance(rejected, RowError) and rejected.detail.endswith(r"not \ud83d")


def test_sharegpt_names_and_roles(base: Path) -> None:
    row = chats(1)[0]
    names = {"user": "human", "assistant": "gpt"}
    other = {"chat": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
    made = encoder(
        base, field_messages="chat", message_property_mappings={"role": "from", "content": "value"}
    )
    assert one(made.encode([other])).ids.tolist() == one(encoder(base).encode([row])).ids.tolist()


def test_train_on_inputs_makes_every_token_a_target(base: Path) -> None:
    sample = one(encoder(base, inputs=True).encode(chats(1)))
    assert sample.targets.all()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_completion_is_the_tokenizers_own_encoding_and_eos(tmp_path: Path, adds_bos: bool) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path, None, add_bos_token=adds_bos)
    if adds_bos:  # the setting of that name alone changes nothing, as in transformers 5
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = encoder(folder, type="completion")
    row = {"text": "the quick brown 🙂"}
    sample = one(made.encode([row]))
    assert sample.ids.tolist() == [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    assert (sample.ids[0] == tokenizer.bos_token_id) == adds_bos
    assert sample.targets.all()
    assert reason(made.encode([{"text": ""}])) == "field 'text' is empty"
    assert reason(made.encode([{"text": None}])) == "no field 'text'"


def test_the_fast_path_is_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary chats never need character offsets: they would cost half of the speed."""
    made = encoder(base)
    assert set(made.loaded.cut_tokens) >= {"<|im_start|>", "<|im_end|>"}
    monkeypatch.setattr(Masker, "_by_offsets", None)
    assert not any(isinstance(result, RowError) for result in made.encode(chats(50)))


def test_tokens_that_are_found_in_the_text_only_change_nothing(base: Path) -> None:
    made = encoder(base)
    made.masker = Masker(made.loaded, ("h", "<|im_end|>"))  # "the" is one token
    rows = chats(30, seed=1)
    for found, sample in zip(encoder(base).encode(rows), made.encode(rows), strict=True):
        assert one([found]).ids.tolist() == one([sample]).ids.tolist()
        assert one([found]).targets.tolist() == one([sample]).targets.tolist()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<s>", "the", " quick", "🙂", "\n"])), st.data()
)
def test_masks_hold_for_any_spans(base: Path, words: list[str], data: st.DataObject) -> None:
    """Found by special tokens, by headers or by offsets: what offsets of the whole text say."""
    made, text = encoder(base), "".join(words)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    spans = tuple(zip(places[::2], places[1::2], strict=False))
    ids = np.array(made.loaded.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
    plain = Masker(made.loaded, ())
    expected = [plain.mask(Rendered(text, (span,)), ids) for span in spans]
    mask = made.masker.mask(Rendered(text, spans), ids)
    assert mask.tolist() == np.max(expected or [np.zeros(len(ids), np.uint8)], axis=0).tolist()


def test_config_errors_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_model: .*tokenizer\.json"):
        load_tokenizer(TokenizerSpec(str(tmp_path / "none"), TOKENIZER_DEFAULT, ()))
    folder = write_tokenizer(tmp_path / "base", None)
    with pytest.raises(ConfigError, match="special_tokens.pad_token: '<nope>'"):
        load_tokenizer(TokenizerSpec(str(folder), TOKENIZER_DEFAULT, (("pad_token", "<nope>"),)))
    with pytest.raises(ConfigError, match="chat_template: the base model's tokenizer has none"):
        encoder(folder)
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for %}")
    with pytest.raises(ConfigError, match="chat_template: line 1"):
        encoder(folder, str(bad))
    assert load_tokenizer(TokenizerSpec(str(folder), TOKENIZER_DEFAULT, (("pad_token", "<s>"),))).pad_id == 3


def test_padding_falls_back_to_eos(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, pad_token=None)
    loaded = load_tokenizer(TokenizerSpec(str(folder), TOKENIZER_DEFAULT, ()))
    assert loaded.pad_id == loaded.eos_id == 2


def test_random_chats_in_one_batch_equal_one_by_one(base: Path) -> None:
    rows = chats(40, seed=random.Random(0).randrange(100))
    together = encoder(base).encode(rows)
    for row, sample in zip(rows, together, strict=True):
        alone = one(encoder(base).encode([row]))
        assert np.array_equal(alone.ids, one([sample]).ids)
        assert np.array_equal(alone.targets, one([sample]).targets)
