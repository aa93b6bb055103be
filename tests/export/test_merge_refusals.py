"""A merge that cannot be right is refused in one line that names what is wrong, and leaves nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.export.__main__ import main
from nemo_ray.export.merge import plan_merge
from nemo_ray.model.adapter_reader import read_adapter
from tests.export.world import adapter_on
from tests.model.shapes import tiny_config


def edit_tensor(folder: Path, key: str, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / index[key])
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / index[key])


def drop_expert(base: Path) -> None:
    """The checkpoint and its index lack an expert."""
    path, key = base / "model.safetensors.index.json", "backbone.layers.5.mixer.experts.7.down_proj.weight"
    index = json.loads(path.read_text())
    name = index["weight_map"].pop(key)
    path.write_text(json.dumps(index))
    tensors = load_file(base / name)
    del tensors[key]
    save_file(tensors, base / name)


def truncate(base: Path) -> None:
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])


def lose_file(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[2].unlink()


def quantize(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


def swap_shards(base: Path) -> None:
    one, two = sorted(base.glob("*.safetensors"))[:2]
    one.write_bytes(two.read_bytes())


IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
BROKEN = {
    "an expert is missing": (drop_expert, CheckpointError, r"lacks backbone\.layers\.5\.mixer\.experts\.7"),
    "truncated": (truncate, CheckpointError, r"model-00002-of-\d+\.safetensors cannot be read"),
    "a file is missing": (lose_file, CheckpointError, r"model-00003-of-.*cannot be read"),
    "swapped": (swap_shards, CheckpointError, r"model-00001-of.* against what .*index\.json says"),
    "quantized": (quantize, ConfigError, "quantization_config"),
    "integers": (
        lambda b: edit_tensor(b, IN_PROJ, lambda t: t.to(torch.float8_e4m3fn)), CheckpointError, "F8_E4M3",
    ),
    "misshapen": (
        lambda b: edit_tensor(b, IN_PROJ, lambda t: t[:, :32].contiguous()), CheckpointError,
        r"layers\.0\.mixer\.in_proj\.weight in .* is \(\d+, 32\), and config\.json makes it \(\d+, 64\)",
    ),
    "no base": (shutil.rmtree, ConfigError, "no folder here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_refused_by_name(plain_base, adapter, tmp_path, name, capsys):
    edit, kind, message = BROKEN[name]
    base = shutil.copytree(plain_base, tmp_path / "base")
    edit(base)
    arguments = [str(adapter), "--merge", "--output", str(tmp_path / "out"), "--base-model", str(base)]
    assert main(arguments) == kind.exit_code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ")
    assert re.search(message, told), told
    assert [path.name for path in tmp_path.iterdir() if path.name != "base"] == []


OTHERS = {
    "another size": (
        {"hidden_size": 128}, {"lora_target_modules": ("q_proj",)},
        r"layers\.2\.mixer\.q_proj of .* for a weight of \(64, 128\), and in .*q_proj\.weight is \(64, 64\)",
    ),
    "other experts": (
        {"n_routed_experts": 16}, {"lora_target_parameters": ("experts.up_proj",)},
        r"layers\.1\.mixer\.experts\.up_proj of .* there is no backbone\.layers\.1\.mixer\.experts\.8\.up",
    ),
    "other blocks": (
        {"pattern": "ME*-ME*"}, {"lora_target_modules": ("q_proj",)},
        r"layers\.6\.mixer\.q_proj of .*, and in .* there is no backbone\.layers\.6\.mixer\.q_proj\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_of_another_base_is_refused_by_its_first_shape(plain_base, tmp_path, name):
    shape, keys, message = OTHERS[name]
    other = tmp_path / "other"
    torch.manual_seed(0)
    NemotronHForCausalLM(tiny_config(**shape)).save_pretrained(other)
    adapter = read_adapter(adapter_on(other, tmp_path / "adapter", **keys))
    with pytest.raises(CheckpointError, match=message) as raised:
        plan_merge(str(plain_base), adapter)
    assert "--base-model" in str(raised.value) and "\n" not in str(raised.value)
