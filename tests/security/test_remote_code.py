"""Code that comes with models, tokenizers, datasets and chat templates is never run, whoever says yes."""

import builtins
import contextlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    NemotronHConfig,
    NemotronHForCausalLM,
    dynamic_module_utils,
)

from nemo_ray.config.schema import AdapterSection, Config
from nemo_ray.data.prepare import read_rows, window_task
from nemo_ray.data.sources import plan_data
from nemo_ray.data.template import RowError, chat_template
from nemo_ray.data.tokenizer import TokenizerSpec, load_tokenizer
from nemo_ray.errors import ConfigError, DataError, NemoRayError
from nemo_ray.export import check
from nemo_ray.export.sides import Setting, plain_logits
from nemo_ray.model import prompt
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.run_dir import RunDir
from nemo_ray.train import worker
from tests.data.helpers import section, write_lines, write_tokenizer
from tests.model.shapes import CPU, tiny_config
from tests.security import code, is_one_line

pytestmark = pytest.mark.timeout(60)
_NUMBERS = itertools.count()


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


@pytest.fixture(autouse=True)
def somebody_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether code may be run. Its copies of it are kept in `tmp_path`."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def base(tmp_path: Path, mark: Path) -> Path:
    """A base whose every class is its own code's, in a file beside it."""
    module = f"theirs{next(_NUMBERS)}"
    own = {name: f"{module}.Theirs{name[4:]}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
    tokenizer = f"{module}.TheirsTokenizer"
    folder = tmp_path / "base"
    torch.manual_seed(0)
    NemotronHForCausalLM(tiny_config()).save_pretrained(folder)
    write_tokenizer(
        folder, tokenizer_class="TheirsTokenizer", auto_map={"AutoTokenizer": [tokenizer, tokenizer]}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    (folder / f"{module}.py").write_text(
        f"{code(mark)}"
        "from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast\n"
        "class TheirsConfig(NemotronHConfig): pass\n"
        "class TheirsModel(NemotronHForCausalLM): pass\n"
        "class TheirsModelForCausalLM(NemotronHForCausalLM): pass\n"
        "class TheirsTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    for name in ("setup.py", "__init__.py", "configuration_nemotron_h.py", "modeling_nemotron_h.py"):
        (folder / name).write_text(code(mark))
    return folder


@pytest.mark.parametrize("auto", [AutoConfig, AutoTokenizer])
def test_the_code_here_would_leave_its_mark(base: Path, mark: Path, auto: Any) -> None:
    auto.from_pretrained(base, trust_remote_code=True)
    assert mark.is_dir()


# -- models ---------------------------------------------------------------------------------------


def test_a_model_is_ours_whatever_its_config_names(base: Path, mark: Path) -> None:
    config = read_model_config(str(base))
    assert type(config) is NemotronHConfig
    model, _ = build(config, AdapterSection(), Precision(), CPU)
    fill(model, str(base), seed=0, device=CPU, adapter_seed=0)
    assert type(model) is NemotronHForCausalLM and not mark.exists()


def test_the_check_of_an_export_loads_transformers_own_model(base: Path, mark: Path) -> None:
    plain_logits(str(base), None, [torch.arange(8)], Setting(CPU, torch.float32), lambda text: None)
    assert not mark.exists()


# -- tokenizers -----------------------------------------------------------------------------------


def test_data_is_encoded_by_the_tokenizers_file_alone(base: Path, mark: Path) -> None:
    loaded = load_tokenizer(TokenizerSpec(str(base), "tokenizer_default", ()))
    assert loaded.tokenizer.encode("the quick brown fox").ids and not mark.exists()


# Whether they refuse such a tokenizer or read its file alone: both will do.


def test_answers_ask_nobody_whether_code_may_run(base: Path, mark: Path) -> None:
    with contextlib.suppress(NemoRayError):
        prompt.load_tokenizer([base])
    assert not mark.exists(), "nemo_ray.model.prompt.load_tokenizer"


def test_completions_in_a_run_ask_nobody(
    base: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "generate_tokens", lambda *_: [])
    datasets = [{"path": "rows.jsonl"}]
    config = Config(base_model=str(base), datasets=datasets, completion_prompts=["Hello?"])
    run, trainee = RunDir(tmp_path / "run"), SimpleNamespace(model=nn.Identity())
    trainer = SimpleNamespace(run_dir=run, rank=1, trainee=trainee, write_progress=lambda *_, **__: None)
    with contextlib.suppress(NemoRayError, ValueError):
        worker.complete_prompts(trainer, config, str(base), "before", 0)  # type: ignore[arg-type]
    assert not mark.exists(), "nemo_ray.train.worker.complete_prompts"


def test_the_prompts_of_a_check_ask_nobody(base: Path, mark: Path) -> None:
    with contextlib.suppress(NemoRayError, ValueError):
        check._prompts(read_model_config(str(base)), [base])
    assert not mark.exists(), "nemo_ray.export.check._prompts"


# -- datasets -------------------------------------------------------------------------------------


def test_a_loading_script_beside_rows_is_left_alone(tmp_path: Path, mark: Path) -> None:
    """Of a folder; for those of the hub see tests/data/test_hub_datasets.py."""
    encoder, folder = write_tokenizer(tmp_path / "encoder"), tmp_path / "chats"
    write_lines(folder / "train.jsonl", [{"text": "the quick brown fox"}] * 40)
    for name in ("chats.py", "dataset.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code(mark))
    data = section(folder, dataset={"type": "completion"})
    plan = plan_data(data, str(encoder), str(tmp_path / "prepared"))
    rows = list(read_rows(window_task(plan, plan.windows[0], data, str(encoder), held_out=False)))
    assert rows and not mark.exists()
    (folder / "train.jsonl").unlink()
    with pytest.raises((ConfigError, DataError)) as raised:
        plan_data(data, str(encoder), str(tmp_path / "prepared"))
    assert is_one_line(str(raised.value))


# -- chat templates -------------------------------------------------------------------------------

ESCAPES = {
    "globals of a function": "{{ cycler.__init__.__globals__.os.mkdir(mark) }}",
    "of the sandbox's own": "{{ raise_exception.__globals__['__builtins__'].open(mark, 'w') }}",
    "by a filter": "{{ (cycler | attr('__init__') | attr('__globals__'))['os'].mkdir(mark) }}",
    "by a format": "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("how", ESCAPES)
def test_a_template_stays_in_its_sandbox(how: str, mark: Path) -> None:
    template = chat_template(ESCAPES[how], {"mark": str(mark)})
    with pytest.raises(RowError) as raised:
        print(template.render([{"role": "user", "content": "Hello?"}]))
    assert is_one_line(raised.value.detail) and not mark.exists()


def test_outside_of_a_sandbox_a_template_would_leave_its_mark(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    jinja2.Environment().from_string(ESCAPES["globals of a function"]).render(mark=str(mark))
    assert mark.is_dir()


def test_answers_keep_templates_in_a_sandbox_too(tmp_path: Path, mark: Path) -> None:
    for how, template in ESCAPES.items():
        text = template.replace("(mark)", f"({str(mark)!r})")
        tokenizer = AutoTokenizer.from_pretrained(
            write_tokenizer(tmp_path / how, template=text, tokenizer_class="PreTrainedTokenizerFast")
        )
        with pytest.raises((NemoRayError, TypeError)):
            prompt.prompt_ids(tokenizer, "Hello?", None, raw=False)
        assert not mark.exists(), how
