"""The base's folder is an ordinary transformers one: tokenizer, chat template and config."""

import json
import string

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nemo_ray.demo import ASSETS

SHAPES = ("base", "latent")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does `len` do?"},
    {"role": "assistant", "content": "Return the number of items in a container."},
    {"role": "user", "content": "And `é😀`?"},
    {"role": "assistant", "content": "    Indented,\nand non-ASCII: é😀."},
]


@pytest.fixture(params=SHAPES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / request.param)


def test_special_ids_agree_with_config(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(tokenizer.name_or_path)
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", config.eos_token_id)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", config.pad_token_id)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
    assert tokenizer.bos_token is None and config.bos_token_id is None


def test_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = (ASSETS / "chats-heldout.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    texts = [json.loads(row)["messages"][-1]["content"] for row in rows]
    texts += [string.printable, "naïve – 東京 😀\x00\u200b", "  two  spaces ", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_template_marks_only_the_assistants_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    runs: list[str] = []
    for position, (token, marked) in enumerate(zip(ids, mask, strict=True)):
        if marked:
            starts = position == 0 or not mask[position - 1]
            runs = [*runs, ""] if starts else runs
            runs[-1] += tokenizer.decode([token]) if token < 3 else ""
    marked_text = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m])
    assert marked_text == "".join(CHAT[turn]["content"].strip() + "<|im_end|>" for turn in (2, 4))
    assert runs == ["<|im_end|>"] * 2


def test_template_text(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat does `len` do?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    whole = tokenizer.apply_chat_template(CHAT[:3], tokenize=False)
    assert whole == prompt + CHAT[2]["content"] + "<|im_end|>\n"


def test_chats_are_short_enough_to_train_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    rows = (ASSETS / "chats.jsonl").read_text(encoding="utf-8").splitlines()[::20]
    texts = [tokenizer.apply_chat_template(json.loads(row)["messages"], tokenize=False) for row in rows]
    lengths = sorted(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    assert lengths[-1] <= 768
    assert sum(50 <= length <= 400 for length in lengths) >= 0.9 * len(lengths)


@pytest.mark.parametrize(("shape", "most", "latent"), [("base", 3_000_000, None), ("latent", 600_000, 64)])
def test_shape(shape: str, most: int, latent: int | None) -> None:
    """All four block kinds within the parameter budget; both spellings of the layers agree."""
    written = json.loads((ASSETS / shape / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(ASSETS / shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "NemotronHForCausalLM" == written["architectures"][0]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.5 * most < num_parameters <= most
    assert set(config.layers_block_type) == {"linear_attention", "full_attention", "moe", "mlp"}
    assert config.hybrid_override_pattern == written["hybrid_override_pattern"]
    assert list(config.layers_block_type) == written["layers_block_type"]
    assert config.moe_latent_size == latent
    assert config.n_routed_experts >= 8
    # What transformers clamps dt at is, for float32 softplus, the reference's lower limit of zero.
    assert config.time_step_min == 1e-6 and tuple(config.time_step_limit) == (0.0, float("inf"))


def test_last_dims_suit_four_bit_blocks() -> None:
    """4-bit blocks hold 64 values along the last dim of a matrix."""
    for shape in SHAPES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / shape))
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name:
                assert parameter.shape[-1] % 64 == 0, name
