"""`nemo-ray generate`: what it reads, prints and refuses, through the command; and its parts."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemo_ray.errors import ConfigError
from nemo_ray.model import generate, inference
from nemo_ray.model.decode import generate_tokens
from nemo_ray.model.generate import TextStream
from nemo_ray.model.load import Precision
from nemo_ray.model.prompt import end_ids, find_source, load_tokenizer, prompt_ids, read_text
from tests.model.shapes import CPU, tiny_config, tiny_model
from tests.model.uncached import complete_greedily

ROOT = Path(__file__).parents[2]
BASE = ROOT / "nemo_ray/demo/assets/base"
COMMAND = [sys.executable, "-m", "nemo_ray.cli", "generate"]
QUESTION = "What does os.path.join do?"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


# -- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_greedy_answer_and_nothing_else(tokenizer):
    done = command("--model", str(BASE), "--max-new-tokens", "40", QUESTION)
    assert done.returncode == 0, done.stderr
    model = inference.load_for_inference(str(BASE), None, Precision(), CPU)
    ids = prompt_ids(tokenizer, QUESTION, None, raw=False)
    expected = complete_greedily(model.packed_logits, ids, 40, end_ids([BASE], tokenizer), CPU)
    assert done.stdout == tokenizer.decode(expected) + "\n" and len(done.stdout) > 20
    assert f"{len(ids)} tokens read, {len(expected)} written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_standard_input_is_the_prompt_and_raw_leaves_out_the_template(tokenizer):
    done = command("--model", str(BASE), "--raw", "--max-new-tokens", "8", input="os.path is\n")
    assert done.returncode == 0, done.stderr
    model = inference.load_for_inference(str(BASE), None, Precision(), CPU)
    ids = tokenizer("os.path is")["input_ids"]
    expected = list(generate_tokens(model, ids, 8, end_ids([BASE], tokenizer)))
    assert done.stdout == tokenizer.decode(expected) + "\n"
    assert f"{len(ids)} tokens read" in done.stderr


@pytest.mark.parametrize("text", ["one line", "its end\n", "two\n\n", ""])
def test_the_text_ends_its_line_once(text, tokenizer, capsys):
    generate.print_tokens(iter(tokenizer(text)["input_ids"]), tokenizer, 3, 9, "")
    assert capsys.readouterr().out == (text if text.endswith("\n") else text + "\n")


@pytest.mark.long
def test_the_text_comes_as_it_is_made_and_stays_after_ctrl_c():
    arguments = ["--model", str(BASE), "--raw", "--max-new-tokens", "100000", "--temperature", "1", "def f("]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=follower, stderr=subprocess.PIPE, text=True
    )
    os.close(follower)
    try:
        assert select.select([leader], [], [], 90)[0], "no text came"
        first = os.read(leader, 1000)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        os.close(leader)
    stderr = process.stderr.read()
    process.stderr.close()
    assert first and "stopped by Ctrl-C" in stderr and "Traceback" not in stderr


@pytest.mark.long
def test_a_reader_that_leaves_is_no_error():
    arguments = ["--model", str(BASE), "--raw", "--max-new-tokens", "100000", "--temperature", "1", "def f("]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.read(3)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
    finally:
        process.kill()
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_wrong_path_is_one_line_and_loads_no_torch(tmp_path):
    code = (
        "import sys; from nemo_ray.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--model", str(tmp_path / "gone"), "x"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --model: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["--temperature", "-1"], "--temperature: -1.0"),
        (["--temperature", "nan"], "--temperature: nan"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: 0.0"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p: 1.5"),
        (["--top-p", "0.5"], "give a --temperature"),
        (["--seed", "-1"], "--seed: -1"),
        (["--raw", "--system", "be brief"], "--system"),
        (["--device", "cuda"], "--device: cuda is not available"),
    ],
)
def test_wrong_values_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate.main(["--model", str(BASE), *arguments, "x"]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_tokenizer_that_is_not_the_model_s_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(inference, "load_for_inference", lambda *_: tiny_model(tiny_config(vocab_size=16)))
    assert generate.main(["--model", str(BASE), "--device", "cpu", QUESTION]) == 2
    assert "beyond the model's 16" in capsys.readouterr().err


# -- which model is meant -------------------------------------------------------------------------


def make_adapter(folder: Path, base: object = str(BASE)) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_a_run_stands_for_its_adapter_and_the_adapter_for_its_base(tmp_path):
    adapter = make_adapter(tmp_path / "run/adapter")
    for named in (tmp_path / "run", adapter):
        source = find_source(None, str(named))
        assert (source.base, source.adapter) == (str(BASE), adapter)
    assert find_source("other", str(adapter)).base == "other"


def test_a_full_run_stands_for_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    for model, adapter in ((str(tmp_path), None), (None, str(tmp_path))):
        source = find_source(model, adapter)
        assert (source.base, source.adapter) == (str(tmp_path / "model"), None)
    with pytest.raises(ConfigError, match="whole model"):
        find_source(str(BASE), str(tmp_path))


def test_a_base_on_the_hub_keeps_its_revision(tmp_path):
    folder = make_adapter(tmp_path / "a", "owner/name")
    assert find_source(None, str(folder)).base == "owner/name"
    config = {"base_model_name_or_path": "owner/name", "revision": "abc"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert find_source(None, str(folder)).base == "owner/name@abc"


def test_what_names_no_model_is_refused(tmp_path):
    make_adapter(tmp_path / "run/adapter")
    make_adapter(tmp_path / "nameless", None)
    make_adapter(tmp_path / "moved", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    make_adapter(tmp_path / "broken").joinpath("adapter_config.json").write_text("{")
    for model, adapter, words in (
        (None, None, "--model: not given"),
        (str(tmp_path / "run"), None, "give it as --adapter"),
        (None, str(tmp_path / "gone"), "no folder"),
        (None, str(tmp_path / "empty"), "adapter_config.json"),
        (None, str(tmp_path / "nameless"), "base_model_name_or_path"),
        (None, str(tmp_path / "broken"), "JSON"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_source(model, adapter)
    for model, adapter, words in (
        (None, tmp_path / "moved", "moved/adapter_config.json.*gone"),
        (tmp_path / "empty", None, "config.json"),
        (BASE / "config.json", None, "no folder"),
    ):
        source = find_source(model and str(model), adapter and str(adapter))
        with pytest.raises(ConfigError, match=words):
            generate.base_folder(source)


# -- the prompt -----------------------------------------------------------------------------------


def test_the_chat_template_frames_the_prompt(tokenizer):
    ids = prompt_ids(tokenizer, "Hello", "Be brief", raw=False)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, "Hello", None, raw=True)) == "Hello"


def test_a_template_that_refuses_is_one_line():
    tokenizer = load_tokenizer([BASE])
    tokenizer.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(ConfigError, match="no system message here"):
        prompt_ids(tokenizer, "Hello", "Be brief", raw=False)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="--raw"):
        prompt_ids(tokenizer, "Hello", None, raw=False)


@pytest.mark.parametrize(
    ("given", "data", "expected"),
    [("x", b"unread", "x"), (None, b"a\nb\n", "a\nb"), ("-", "é\n\n".encode(), "é\n")],
)
def test_standard_input_is_read_where_no_prompt_is_given(given, data, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_text(given) == expected


@pytest.mark.parametrize(
    ("given", "data"), [("", b""), (None, b""), (None, b"\n"), ("-", b"\xff\xfe"), ("a\udcff", b"")]
)
def test_no_text_is_refused(given, data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(ConfigError, match="PROMPT"):
        read_text(given)


def test_a_closed_standard_input_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="PROMPT: not given, and standard input is closed"):
        read_text(None)


def test_end_tokens_are_the_generation_config_s_and_the_tokenizer_s(tokenizer, tmp_path):
    assert end_ids([tmp_path, BASE], tokenizer) == {tokenizer.eos_token_id}
    for listed, expected in ((7, {7}), ([5, 6], {5, 6}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert end_ids([BASE, tmp_path], tokenizer) == expected | {tokenizer.eos_token_id}


# -- the text -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4095), max_size=40))
def test_the_pieces_are_the_whole_text(tokenizer, ids):
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@given(st.text(max_size=20))
def test_no_character_is_broken(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_text_comes_at_once_where_a_token_ends_a_character(tokenizer):
    ids = tokenizer("import os é 🙂 end")["input_ids"]
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert len([piece for piece in pieces if not piece]) > 2  # the bytes of the emoji
    assert pieces[0] and pieces[1] and pieces[-1] and "🙂" in pieces
