"""A merged checkpoint is the base's, key for key, and computes what base and adapter compute."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import NemotronHForCausalLM

from nemo_ray.errors import ConfigError
from nemo_ray.export import output
from nemo_ray.export.__main__ import main
from nemo_ray.export.merge import plan_merge, write_merged
from nemo_ray.model.adapter_reader import read_adapter
from tests.export.world import ADAPTERS, IDS, adapter_on, all_tensors, our_logits, plain_logits, save_base
from tests.model.shapes import tiny_config

EVERYTHING = ADAPTERS["everything"]


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    assert main([str(adapter), "--merge", "--output", str(folder), "--base-model", str(base)]) == 0
    return folder


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_computes_what_base_and_adapter_compute(either_base, name, tmp_path):
    base = either_base
    adapter = adapter_on(base, tmp_path / "adapter", **ADAPTERS[name])
    out = merged(base, adapter, tmp_path / "out")
    ours, before = our_logits(base, ADAPTERS[name]), our_logits(base)
    assert (ours - before).abs().max() > 0.1 * before.std(), "the adapter acts"
    assert (plain_logits(out) - ours).abs().max() < 1e-5 * ours.std()


def test_files_keys_and_metadata_are_the_base_s(plain_base, tmp_path):
    adapter = adapter_on(plain_base, tmp_path / "adapter", lora_target_modules=("q_proj",))
    out = merged(plain_base, adapter, tmp_path / "out")
    files = sorted(path.name for path in plain_base.glob("*.safetensors"))
    assert len(files) > 3 and sorted(path.name for path in out.glob("*.safetensors")) == files
    assert all(header(out / name) == header(plain_base / name) for name in files)
    assert all((out / name).stat().st_mode & 0o777 == 0o644 for name in files)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (plain_base / index).read_bytes()
    before, after = all_tensors(plain_base), all_tensors(out)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"backbone.layers.2.mixer.q_proj.weight"}
    assert "mtp.layers.0.norm.weight" in after


def test_config_and_companions_come_along(plain_base, adapter, tmp_path, capsys):
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    (adapter / "generation_config.json").write_text('{"eos_token_id": 11}')
    base = shutil.copytree(plain_base, tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    out = merged(base, adapter, tmp_path / "out")
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert config.pop("hybrid_override_pattern") == "ME*-ME"
    assert config["layers_block_type"][:2] == ["linear_attention", "moe"]
    before.pop("hybrid_override_pattern", None)
    assert config == before and config["num_nextn_predict_layers"] == 1
    assert "of the base" in (out / "tokenizer_config.json").read_text()
    assert (out / "configuration_nemotron_h.py").exists(), "auto_map of config.json names it"
    assert "11" in (out / "generation_config.json").read_text(), "the adapter's, where the base has none"
    assert not (out / "adapter_config.json").exists()
    assert "mtp" in (out / "README.md").read_text() and "mtp" in capsys.readouterr().out


def assert_rounded_once(stored: torch.Tensor, exact: torch.Tensor) -> None:
    """bfloat16 keeps eight bits: rounded once, nothing is off by more than half of the last."""
    assert ((stored.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_a_bfloat16_base_is_rounded_once(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    folder = adapter_on(base, tmp_path / "adapter", **EVERYTHING)
    out, adapter = merged(base, folder, tmp_path / "out"), read_adapter(folder)
    before, after = all_tensors(base), all_tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    pairs = {f"{path}.weight".replace("model.", "backbone.", 1): f for path, f in adapter.linear.items()}
    for key, f in pairs.items():
        assert_rounded_once(after[key], before[key].double() + f.scaling * f.B.double() @ f.A.double())
    for path, f in adapter.experts.items():
        bank, _, leaf = path.replace("model.", "backbone.", 1).rpartition(".")
        for expert in range(8):
            key = f"{bank}.{expert}.{leaf}.weight"
            change = f.scaling * f.B[expert].double() @ f.A[expert].double()
            assert_rounded_once(after[key], before[key].double() + change)
    assert len(pairs) + 16 * 2 == sum(not torch.equal(before[key], after[key]) for key in before)


def test_modules_trained_whole_and_peft_s_own_adapters(plain_base, tmp_path):
    plain = NemotronHForCausalLM.from_pretrained(plain_base, dtype=torch.float32)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"q_proj": 5},
        modules_to_save=["lm_head", "embeddings"],
        base_model_name_or_path=str(plain_base),
    )
    peft = get_peft_model(plain, lora).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    out = merged(plain_base, tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        theirs = peft(input_ids=IDS, use_cache=False).logits
    assert (plain_logits(out) - theirs).abs().max() < 1e-5 * theirs.std()


def test_an_old_spelling_and_a_single_file_are_kept(plain_base, adapter, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(plain_base / "config.json", base)
    tensors = all_tensors(plain_base)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, base / "model.safetensors")
    out = merged(base, adapter, tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()


def test_the_same_command_twice_leaves_the_first_result(plain_base, adapter, tmp_path, capsys):
    out = merged(plain_base, adapter, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(adapter), "--merge", "--output", str(out), "--base-model", str(plain_base)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    again = merged(plain_base, adapter, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.glob("*.safetensors")} == {
        name: data for name, data in before.items() if name.endswith(".safetensors")
    }


def test_a_full_disk_is_seen_before_and_survived(plain_base, adapter, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"GiB free, and .* GiB are written"):
        output.require_output(tmp_path / "new/out", 10**18)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_ray.export.merge.write_text", full)
    assert main([str(adapter), "--merge", "--output", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


# -- size and interruption ------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from nemo_ray.export.merge import plan_merge, write_merged
from nemo_ray.model.adapter_reader import read_adapter

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

adapter, base, out = sys.argv[1:]
merge = plan_merge(base, read_adapter(adapter))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
Path(out).mkdir()
write_merged(merge, Path(out), print)
print(memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[Path, Path]:
    """A base of some files of about 64 MiB, and an adapter on its experts and its projections."""
    folder = tmp_path_factory.mktemp("big")
    config = tiny_config(
        pattern="ME*ME", vocab_size=32768, hidden_size=512, n_routed_experts=64, moe_intermediate_size=256
    )
    torch.manual_seed(0)
    NemotronHForCausalLM(config).save_pretrained(folder / "base", max_shard_size="66MB")
    keys = {"lora_target_linear": True, "lora_target_parameters": ("experts.up_proj", "experts.down_proj")}
    return folder / "base", adapter_on(folder / "base", folder / "adapter", **keys)


def test_a_merge_takes_the_memory_of_one_file(big, tmp_path):
    base, adapter = big
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    assert len(list(base.glob("*.safetensors"))) >= 3 and largest > 60e6
    command = [sys.executable, "-c", MEASURE, str(adapter), str(base), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5 * largest


def test_a_killed_merge_leaves_no_output(big, tmp_path):
    base, adapter = big
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nemo_ray.export", str(adapter), "--merge", "--output", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("model-00001-of-")
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not out.exists()
    assert len(output.leftovers(out)) == 1, "the next export names it"


def test_ctrl_c_leaves_nothing(plain_base, adapter, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_ray.export.merge.write_text", interrupted)
    assert main([str(adapter), "--merge", "--output", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_what_is_planned_is_what_changes(plain_base, adapter, tmp_path):
    merge = plan_merge(str(plain_base), read_adapter(adapter))
    (tmp_path / "out").mkdir()
    write_merged(merge, tmp_path / "out", lambda line: None)
    before, after = all_tensors(plain_base), all_tensors(tmp_path / "out")
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(merge.changed)
