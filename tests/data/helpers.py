"""A tiny tokenizer with a chat template, chats to render, and plans over files in a temporary folder."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemo_ray.config.schema import DataSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import prepare_window, window_task
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.window_list import Window

MARKED = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
{% else %}{{ message['content'] }}<|im_end|>{% endif %}

{% endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""

PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<s>")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
]
WORDS += ["in", "quiet\n\n", "rooms", "12", "34", "ünï", "你好", "🙂"]


def write_tokenizer(
    folder: Path, template: str | None = MARKED, trim_offsets: bool = False, **settings: Any
) -> Path:
    """A byte-level BPE of a few hundred tokens, as a transformers folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(random.Random(i), 40) for i in range(200)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def chat(generator: random.Random, turns: int = 2, words: int = 12) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        for role in ("user", "assistant"):
            length = max(1, int(generator.gammavariate(2.0, words / 2)))
            messages.append({"role": role, "content": f"{turn} {text(generator, length)}"})
    return {"messages": messages}


def chats(count: int, seed: int = 0, **options: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [chat(generator, **options) for _ in range(count)]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def section(path: str | Path, *, dataset: dict[str, Any] | None = None, **keys: Any) -> DataSection:
    """A data configuration with one dataset."""
    entry = {"path": str(path), **(dataset or {})}
    return DataSection.model_validate({"datasets": [entry], "sequence_len": 128, **keys})


def prepare_all(
    plan: DataPlan, data: DataSection, base_model: str | Path, windows: Sequence[Window] | None = None
) -> list[ShardStats]:
    """What the pipeline does, without Ray."""
    result = []
    for held_out, part in ((True, plan.eval_windows), (False, plan.windows)):
        for window in part:
            if windows is None or window in windows:
                task = window_task(plan, window, data, str(base_model), held_out=held_out)
                result.append(prepare_window(task))
    return result
