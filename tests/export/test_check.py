"""The check loads what others would load, passes where it is right, and says so where it is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.export import check
from nemo_ray.export.__main__ import main
from nemo_ray.export.check import Setting, check_adapter, check_merged, difference
from nemo_ray.model.adapter_reader import read_adapter
from tests.export.world import ADAPTERS, adapter_on
from tests.model.shapes import tiny_config

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = Setting(CPU, torch.float32), Setting(CPU, torch.bfloat16)
EVERYTHING = ADAPTERS["everything"] | {"lora_modules_to_save": ("lm_head",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Its step limit matters: transformers would clamp many steps from below."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = tiny_config(time_step_min=0.5, time_step_limit=(0.0, float("inf")))
    NemotronHForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), **EVERYTHING)


def lines(call, *arguments) -> str:
    said: list[str] = []
    call(*arguments, said.append)
    return "\n".join(said)


def test_an_adapter_passes_in_both_types_and_the_guard_is_put_back(base, adapter):
    kept = LoraModel.__dict__.get("_check_target_module_compatiblity")
    for setting in (FLOAT32, BFLOAT16):
        told = lines(check_adapter, str(base), read_adapter(adapter), setting)
        assert "checked the adapter in PEFT" in told and "time_step_limit is set to" in told
        assert "refusal of out_proj is lifted" in told and "the adapter itself moves" in told
    assert LoraModel.__dict__.get("_check_target_module_compatiblity") is kept
    with pytest.raises(ValueError, match="out_proj"):
        PeftModel.from_pretrained(NemotronHForCausalLM.from_pretrained(base), adapter)


def test_a_folder_that_transformers_cannot_load_is_a_result(base, adapter, tmp_path):
    out = tmp_path / "out"
    assert main([str(adapter), "--merge", "--output", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(CheckpointError, match="check: transformers cannot load .*out: ") as raised:
        check_merged(str(base), read_adapter(adapter), out, FLOAT32, lambda line: None)
    assert "\n" not in str(raised.value)


def test_a_merge_is_checked_before_it_appears(base, adapter, tmp_path, capsys, monkeypatch):
    arguments = [str(adapter), "--merge", "--check", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(check, "LIMITS", {torch.float32: (0.0, 0.0)})
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: check: the merged model") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "checked the merged model in transformers" in told and "what merging rounds" in told
    assert (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("key", ["layers.1.mixer.experts.3.up_proj", "layers.0.mixer.out_proj"])
def test_a_single_weight_that_was_not_merged_is_seen(base, adapter, tmp_path, key):
    out = tmp_path / "out"
    assert main([str(adapter), "--merge", "--output", str(out)]) == 0
    key = f"backbone.{key}.weight"
    name = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][key]
    save_file(load_file(out / name) | {key: load_file(base / name)[key]}, out / name)
    with pytest.raises(CheckpointError, match="differs from ours in float32 on cpu: max difference"):
        check_merged(str(base), read_adapter(adapter), out, FLOAT32, lambda line: None)


def test_bfloat16_that_cannot_see_the_adapter_is_no_success(base, tmp_path):
    folder = adapter_on(base, tmp_path / "adapter", lora_target_modules=("q_proj",), lora_alpha=0.01)
    with pytest.raises(CheckpointError, match="too coarse to tell; use --dtype float32"):
        check_adapter(str(base), read_adapter(folder), BFLOAT16, lambda line: None)
    check_adapter(str(base), read_adapter(folder), FLOAT32, lambda line: None)


def test_differences_are_in_deviations_and_nats():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator)
    assert difference([logits], [logits]) == check.Difference(0.0, 0.0, 0.0)
    off = logits.clone()
    off[7, 5] += 0.6
    found = difference([logits, logits], [logits, off])
    assert found.typical == 0.0
    assert found.largest == pytest.approx(0.6 / float(logits.std()), rel=1e-5)
    p, q = logits[7].double().softmax(-1), off[7].double().softmax(-1)
    assert found.mean_kl == pytest.approx(float((p * (p / q).log()).sum()) / 100, rel=1e-6)


def test_too_large_a_model_and_too_little_cuda_are_refused(base, adapter, monkeypatch):
    monkeypatch.setattr(check, "_free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="GiB are free; use --dtype bfloat16"):
        check_adapter(str(base), read_adapter(adapter), FLOAT32, lambda line: None)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        setting = Setting(torch.device("cuda"), torch.float32)
        with pytest.raises(ConfigError, match="cuda is not available"):
            check_adapter(str(base), read_adapter(adapter), setting, lambda line: None)


# -- the command ----------------------------------------------------------------------------------


def run_of(base: Path, adapter: Path, folder: Path) -> Path:
    """The output_dir of a run that trained this adapter, with a tokenizer beside it."""
    shutil.copytree(adapter, folder / "adapter")
    (folder / "run.json").write_text(json.dumps({"config": {"base_model": str(base)}}))
    return folder


def test_the_command_merges_and_checks_a_run(base, adapter, tmp_path):
    run = run_of(base, adapter, tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "nemo_ray.export", "run", "--merge", "--check", "--output", "new/merged"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "checked the merged model" in done.stdout and done.stdout.splitlines()[-1].startswith("merged ")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    assert done.stderr == "" and run.is_dir()


def test_a_base_named_by_its_hub_id_is_fetched(base, adapter, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "some/model", "revision": "abc"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    asked: list[str] = []

    def local_folder(model: str, *, weights: bool, say) -> Path:
        asked.append(model)
        assert weights
        return base

    monkeypatch.setattr("nemo_ray.hub.local_folder", local_folder)
    assert main([str(folder), "--merge", "--output", str(tmp_path / "out")]) == 0
    assert asked == ["some/model@abc"]


def test_a_whole_model_is_checked_and_not_merged(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "run/model")
    assert main([str(tmp_path / "run"), "--check"]) == 0
    assert "checked the model in transformers" in capsys.readouterr().out
    assert main([str(tmp_path / "run"), "--merge", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "is a whole model already" in told and told.count("\n") == 1
    assert main([str(tmp_path / "run"), "--check", "--base-model", str(base)]) == 2
    told = capsys.readouterr().err
    assert "trained the whole model, which has no base" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "nothing to do"),
        (["{adapter}", "--merge"], "--output: not given"),
        (["{adapter}", "--check", "--output", "x"], "writes nothing"),
        (["{adapter}", "--per-expert-keys", "--check", "--output", "x"], "cannot read per-expert keys"),
        (["{adapter}", "--merge", "--output", "x", "--device", "cuda"], "--device: only --check computes"),
        (["{adapter}", "--per-expert-keys", "--output", "x", "--dtype", "float32"], "--dtype: only --check"),
        (["nowhere", "--check"], "nowhere is no folder"),
        (["{empty}", "--check"], "neither a run nor an adapter"),
        (["{adapter}", "--check", "--base-model", "/nowhere"], "/nowhere of --base-model is no folder here"),
    ],
)
def test_mistakes_are_one_line(adapter, tmp_path, arguments, message, capsys):
    given = [text.format(adapter=adapter, empty=tmp_path) for text in arguments]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and told.startswith("error: ")
