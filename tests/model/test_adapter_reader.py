"""Reading adapters: the factors that training held and PEFT saves, and refusals that name the mistake."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import NemoRayError
from nemo_ray.model.adapter import save_adapter
from nemo_ray.model.adapter_reader import read_adapter
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.lora import LoraLinear
from nemo_ray.model.saving import SavedBase
from tests.model.shapes import ALL_TARGETS, CPU, randomize_lora, tiny_config

ONE_BANK = {"adapter": "lora", "lora_r": 6, "lora_target_parameters": ("experts.up_proj",)}
RSLORA = ALL_TARGETS | {"peft_use_rslora": True, "lora_alpha": 3.0}


def written(folder: Path, keys: dict[str, object], latent: int | None = None):
    """A model with random factors, saved as training saves it."""
    section = AdapterSection(**keys)
    model, targets = build(tiny_config(latent=latent), section, Precision(), CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    randomize_lora(model)
    (folder / "base").mkdir()
    model.config.save_pretrained(folder / "base")
    save_adapter(model, section, targets, SavedBase(str(folder / "base")), folder / "adapter", write=True)
    return model


@pytest.mark.parametrize("keys", [ALL_TARGETS, ONE_BANK, RSLORA], ids=["all", "one bank", "rslora"])
@pytest.mark.parametrize("latent", [None, 32], ids=["plain", "latent"])
def test_what_training_saved_is_read(tmp_path, keys, latent):
    model = written(tmp_path, keys, latent)
    adapter = read_adapter(tmp_path / "adapter")
    wanted = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert adapter.linear.keys() == wanted
    assert len(adapter.experts) == 2 * len(keys["lora_target_parameters"]), "in two MoE blocks"
    for path, factors in adapter.linear.items():
        module = model.get_submodule(path)
        assert torch.equal(factors.A, module.lora_A) and torch.equal(factors.B, module.lora_B)
        assert factors.shape == tuple(module.weight.shape) and factors.scaling == module.scaling
    for path, factors in adapter.experts.items():
        owner, _, leaf = path.rpartition(".")
        bank, side = model.get_submodule(owner), leaf.removesuffix("_proj")
        assert torch.equal(factors.A, getattr(bank, f"{side}_lora_A"))
        assert torch.equal(factors.B, getattr(bank, f"{side}_lora_B"))
        assert factors.shape == tuple(getattr(bank, leaf).shape) and factors.scaling == bank.scalings[side]


def test_layers_come_in_numerical_order(tmp_path):
    section = AdapterSection(adapter="lora", lora_target_modules=("q_proj",))
    config = tiny_config(pattern="*" * 12)
    model, targets = build(config, section, Precision(), CPU)
    fill(model, None, seed=0, device=CPU, adapter_seed=0)
    save_adapter(model, section, targets, SavedBase(str(tmp_path)), tmp_path / "adapter", write=True)
    numbers = [int(path.split(".")[2]) for path in read_adapter(tmp_path / "adapter").linear]
    assert numbers == list(range(12))


def test_what_peft_saved_is_read_with_its_patterns(tmp_path):
    plain = NemotronHForCausalLM(tiny_config())
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "shared_experts.up_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
        rank_pattern={"q_proj": 8, r"layers\.1\.mixer\.experts\.down_proj": 2},
        alpha_pattern={"k_proj": 3, "experts.up_proj": 5},
        modules_to_save=["lm_head", "norm_f"],
    )
    peft = get_peft_model(plain, lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    peft.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert set(adapter.modules_to_save) == {"lm_head.weight", "model.norm_f.weight"}
    assert torch.equal(
        adapter.modules_to_save["lm_head.weight"],
        peft.base_model.model.lm_head.modules_to_save["default"].weight,
    )
    assert adapter.modules_to_save.shape("lm_head.weight") == (128, 64)
    assert {path.rpartition(".")[2] for path in adapter.linear} == {"q_proj", "k_proj", "up_proj"}
    for path, factors in adapter.linear.items():
        change = peft.base_model.model.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(factors.scaling * factors.B @ factors.A, change)
    for path, factors in adapter.experts.items():
        wrapper = peft.base_model.model.get_submodule(path.rpartition(".")[0])
        wrapper = wrapper if path.endswith("down_proj") else wrapper.base_layer
        torch.testing.assert_close(
            factors.scaling * factors.B @ factors.A, wrapper.get_delta_weight("default")
        )
    ranks = {path: factors.rank for path, factors in adapter.experts.items()}
    assert ranks["model.layers.1.mixer.experts.down_proj"] == 2
    assert ranks["model.layers.5.mixer.experts.down_proj"] == 4


def test_factors_are_read_when_they_are_asked_for(tmp_path):
    written(tmp_path, ALL_TARGETS)
    adapter = read_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: torch.full_like(value, 2.0) for key, value in load_file(file).items()}, file)
    assert all(bool((f.A == 2).all()) for f in [*adapter.linear.values(), *adapter.experts.values()])


def edit_config(**changes: object):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


PREFIX = "base_model.model.model.layers."
MISTAKES = {
    "no folder": (shutil.rmtree, r"adapter_config\.json does not exist"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json is not JSON"),
    "not lora": (edit_config(peft_type="LOHA"), "peft_type 'LOHA'"),
    "dora": (edit_config(use_dora=True), "use_dora: True"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    "rank 0": (edit_config(r=0), "r 0, not a positive number"),
    "rank": (edit_config(r=3), r"lora_A \(4, 64\) and lora_B .* of .*in_proj do not fit rank 3"),
    "no target": (edit_config(target_parameters=None, r=4), None),
    "no tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"model\.safetensors does not exist",
    ),
    "truncated": (truncate, r"adapter_model\.safetensors cannot be read"),
    "half a pair": (
        edit_tensors(lambda t: t.pop(f"{PREFIX}2.mixer.q_proj.lora_B.weight")),
        r"lacks lora_B of model\.layers\.2\.mixer\.q_proj",
    ),
    "half a bank": (
        edit_tensors(lambda t: [t.pop(f"{PREFIX}1.mixer.experts.lora_{x}.weight") for x in "AB"]),
        r"factors of .*experts\.base_layer and none of .*experts",
    ),
    "unknown": (
        edit_tensors(lambda t: t.update({f"{PREFIX}0.norm.weight": torch.ones(64)})),
        r"holds .*layers\.0\.norm\.weight, which is neither",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_adapter_is_refused_by_name(tmp_path, mistake):
    written(tmp_path, ALL_TARGETS)
    edit, message = MISTAKES[mistake]
    edit(tmp_path / "adapter")
    if message is None:  # both projections have factors, and their nesting says which is which
        read_adapter(tmp_path / "adapter")
        return
    with pytest.raises(NemoRayError, match=message) as raised:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(raised.value)


def test_a_single_bank_needs_its_name(tmp_path):
    written(tmp_path, ONE_BANK)
    edit_config(target_parameters=["up_proj", "down_proj"])(tmp_path / "adapter")
    with pytest.raises(NemoRayError, match=re.escape("names up_proj and down_proj of its projections")):
        read_adapter(tmp_path / "adapter")
