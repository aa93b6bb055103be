"""An adapter with keys for each expert says the same as the one it was made from, in one rank and scaling."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import NemotronHForCausalLM

from nemo_ray.export.__main__ import main
from nemo_ray.model.adapter_reader import read_adapter
from tests.export.world import ADAPTERS, adapter_on, all_tensors, save_base

EXPERT = re.compile(
    r"base_model\.model\.model\.layers\.(1|5)\.mixer\.experts\.(\d)\.(up|down)_proj\.lora_(A|B)\.weight"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", latent=32)


def peft_adapter(base: Path, folder: Path) -> Path:
    """An adapter of PEFT's own with different ranks and scalings."""
    lora = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "in_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 6, "in_proj": 2},
        alpha_pattern={"q_proj": 5},
    )
    peft = get_peft_model(NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


def made_from(base: Path, kind: str, folder: Path) -> Path:
    return peft_adapter(base, folder) if kind == "peft" else adapter_on(base, folder, **ADAPTERS[kind])


@pytest.mark.parametrize("kind", ["everything", "experts only", "one projection", "peft"])
def test_every_expert_has_both_pairs_and_the_same_change(base, kind, tmp_path):
    adapter = made_from(base, kind, tmp_path / "adapter")
    assert main([str(adapter), "--per-expert-keys", "--output", str(tmp_path / "out")]) == 0
    state = load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    found = {match.groups() for key in state if (match := EXPERT.fullmatch(key))}
    assert found == {(n, str(e), s, x) for n in "15" for e in range(8) for s in ("up", "down") for x in "AB"}
    assert {t.shape[0] for k, t in state.items() if "lora_A" in k} == {config["r"]}, "one rank"
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["target_parameters"]
    assert {"up_proj", "down_proj"} <= set(config["target_modules"])
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    before = read_adapter(adapter)

    def change(module: str) -> torch.Tensor:
        prefix = f"base_model.model.{module}"
        return scaling * state.pop(f"{prefix}.lora_B.weight") @ state.pop(f"{prefix}.lora_A.weight")

    for path, factors in before.linear.items():
        torch.testing.assert_close(change(path), factors.scaling * factors.B @ factors.A)
    for path, factors in before.experts.items():
        bank, _, leaf = path.rpartition(".")
        for expert, (A, B) in enumerate(zip(factors.A, factors.B, strict=True)):
            torch.testing.assert_close(change(f"{bank}.{expert}.{leaf}"), factors.scaling * B @ A)
    assert not any(tensor.any() for tensor in state.values()), "what was not targeted does nothing"
    assert bool(state) == (kind == "one projection")


def test_it_merges_to_the_same_weights(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter")
    main([str(adapter), "--per-expert-keys", "--output", str(tmp_path / "unfused")])
    for name in ("adapter", "unfused"):
        arguments = [str(tmp_path / name), "--merge", "--output", str(tmp_path / f"{name}-merged")]
        assert main([*arguments, "--base-model", str(base)]) == 0
    one, two = (all_tensors(tmp_path / f"{name}-merged") for name in ("adapter", "unfused"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (ADAPTERS["attention and mamba"], "no factors of routed experts"),
        (ADAPTERS["experts only"] | {"lora_modules_to_save": ("lm_head",)}, "holds lm_head.weight whole"),
    ],
    ids=["no experts", "a head"],
)
def test_what_gains_nothing_or_loses_a_part_is_refused(base, tmp_path, keys, message, capsys):
    adapter = adapter_on(base, tmp_path / "adapter", **keys)
    assert main([str(adapter), "--per-expert-keys", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
