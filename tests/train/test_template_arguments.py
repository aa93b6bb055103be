"""What the configuration says about chat templates holds in training too."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.schema import Config
from nemo_ray.train import outputs, worker
from tests.data.helpers import write_tokenizer
from tests.data.nemotron import UNMARKED


def config(**keys: Any) -> Config:
    return Config.model_validate({"base_model": "base", "datasets": [{"path": "rows.jsonl"}], **keys})


@pytest.mark.parametrize(("thinks", "prompt"), [(True, "<think>\n"), (False, "<think></think>")])
def test_completions_are_asked_for_as_is_trained(tmp_path: Path, thinks: bool, prompt: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "base", UNMARKED))
    keys = config(chat_template_kwargs={"enable_thinking": thinks})
    asked = "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(worker.prompt_ids(tokenizer, "quick", keys)) == asked + prompt
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    own = config(chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.decode(worker.prompt_ids(tokenizer, "quick", own)) == "quick"


def test_a_datasets_template_becomes_absolute_outside_a_job_only(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("")
    datasets = [
        {"path": "rows.jsonl", "chat_template": name} for name in ("mine.jinja", "tokenizer_default", None)
    ]
    here = outputs.resolve_paths(config(datasets=datasets), job=False, cwd=tmp_path)
    templates = [spec.chat_template for spec in here.datasets]
    assert templates == [str(tmp_path / "mine.jinja"), "tokenizer_default", None]
    job = outputs.resolve_paths(config(datasets=datasets), job=True, cwd=tmp_path)
    assert job.datasets[0].chat_template == "mine.jinja"
