"""What the configuration says about chat templates holds in training too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_ray.config.schema import Config
from nemo_ray.run_dir import RunDir
from nemo_ray.train import outputs, worker
from tests.data.helpers import write_tokenizer
from tests.data.nemotron import UNMARKED


def config(**keys: Any) -> Config:
    return Config.model_validate({"base_model": "base", "datasets": [{"path": "rows.jsonl"}], **keys})


@pytest.mark.parametrize(("thinks", "prompt"), [(True, "<think>\n"), (False, "<think></think>")])
def test_completions_are_asked_for_as_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thinks: bool, prompt: str
) -> None:
    base = write_tokenizer(tmp_path / "base", UNMARKED)
    asked: list[list[int]] = []

    def generate(model: object, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
        asked.append(ids)
        return [40]

    monkeypatch.setattr(worker, "generate_tokens", generate)
    model = SimpleNamespace(eval=lambda: model, train=lambda: model)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    trainer = SimpleNamespace(
        rank=0,
        run_dir=run,
        state=SimpleNamespace(step=0),
        trainee=SimpleNamespace(model=model),
        write_progress=lambda phase, now: None,
    )
    keys = config(completion_prompts=["quick"], chat_template_kwargs={"enable_thinking": thinks})
    worker.complete_prompts(trainer, keys, str(base), "before")  # type: ignore[arg-type]
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(base).decode(asked[0])
    assert text == "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n" + prompt
    assert run.read_completions()[0]["prompt"] == "quick"


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
