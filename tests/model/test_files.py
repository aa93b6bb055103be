"""Files: NVIDIA's layout in and out, PEFT's adapters, and what happens to broken ones."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.model import saving
from nemo_ray.model.adapter import save_adapter
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, count_parameters, fill, read_model_config
from nemo_ray.model.saving import SavedBase, save_model
from tests.model.shapes import ALL_TARGETS, CPU, randomize_lora, tiny_config

IDS = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
FULL = AdapterSection()
NO_OUT_PROJ = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj")


@pytest.fixture(scope="module", params=[None, 32], ids=["plain", "latent"])
def base(request, tmp_path_factory) -> Path:
    """A folder as transformers saves it: NVIDIA's keys, from a plain random model."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    NemotronHForCausalLM(tiny_config(latent=request.param)).save_pretrained(folder)
    return folder


def our_model(base: Path, adapter: AdapterSection = FULL):
    model, targets = build(read_model_config(str(base)), adapter, Precision(), CPU)
    fill(model, str(base), seed=0, device=CPU, adapter_seed=1)
    return model.eval(), targets


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.packed_logits(PackedBatch.from_lengths(IDS, [[IDS.shape[1]]]))


def plain_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def test_a_base_loads_as_transformers_loads_it(base):
    plain = NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(our_logits(our_model(base)[0]), plain_logits(plain), rtol=1e-4, atol=1e-4)


def test_a_full_model_is_saved_key_identical_and_loads_plainly(base, tmp_path):
    model, _ = our_model(base)
    save_model(model, model.config, SavedBase(str(base)), tmp_path / "out", torch.float32, write=True)
    saved, source = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    assert saved.keys() == source.keys() and len(saved) > 60
    assert all(torch.equal(saved[key], source[key]) for key in source)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["hybrid_override_pattern"] == "ME*-ME" and len(config["layers_block_type"]) == 6
    plain = NemotronHForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain_logits(plain), our_logits(model), rtol=1e-4, atol=1e-4)


ADAPTERS = {
    "attention and mamba": {"lora_target_modules": NO_OUT_PROJ},
    "experts only": {"lora_target_parameters": ("experts.up_proj", "experts.down_proj")},
    "experts of one block": {"lora_target_parameters": ("layers.5.mixer.experts.up_proj",)},
    "one projection": {"lora_target_parameters": ("experts.down_proj",)},
    "shared experts and experts": {
        "lora_target_modules": ("up_proj", "down_proj", "q_proj"),
        "lora_target_parameters": ("up_proj", "down_proj"),
        "peft_use_rslora": True,
        "lora_r": 6,
    },
    "one block": {"lora_target_modules": (r".*layers\.2\.mixer\.[qk]_proj",), "lora_alpha": 3.0},
    "out_proj": {"lora_target_modules": (*NO_OUT_PROJ, "out_proj")},
    "all, out_proj too": ALL_TARGETS,
    "other ranks and alphas": {
        "lora_target_modules": ("up_proj", "in_proj", "q_proj"),
        "lora_target_parameters": ("up_proj", "down_proj"),
        "rank_pattern": {"experts.up_proj": 2, "shared_experts.up_proj": 8, r".*layers\.0\..*": 3},
        "alpha_pattern": {"experts.down_proj": 2.0, "q_proj": 5},
    },
    "head and embeddings": {
        "lora_target_modules": ("q_proj",),
        "lora_modules_to_save": ("lm_head", "embeddings"),
    },
}


@torch.no_grad()
def shift_whole_modules(model, targets) -> None:
    for path in targets.saved.values():
        weight = model.get_submodule(path).weight
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_same_logits_in_plain_peft(base, name, tmp_path, monkeypatch):
    section = AdapterSection(**({"adapter": "lora", "lora_r": 4} | ADAPTERS[name]))
    model, targets = our_model(base, section)
    before = our_logits(model)
    randomize_lora(model)
    shift_whole_modules(model, targets)
    save_adapter(model, section, targets, SavedBase(str(base)), tmp_path / "adapter", write=True)
    plain = NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "out_proj" in name:
        with pytest.raises(ValueError, match="out_proj"):
            PeftModel.from_pretrained(plain, tmp_path / "adapter")
        monkeypatch.setattr(LoraModel, "_check_target_module_compatiblity", lambda *args, **kwargs: None)
        lifting = (tmp_path / "adapter/README.md").read_text()
        assert "LoraModel._check_target_module_compatiblity = lambda" in lifting
        plain = NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ours = our_logits(model)
    assert (ours - before).abs().max() > 0.1 * before.std(), "the adapter acts"
    assert (plain_logits(peft) - ours).abs().max() < 1e-5 * ours.std()


def test_an_old_spelling_of_the_embedding_is_read(base, tmp_path):
    copy = copy_of(base, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, copy / "model.safetensors")
    torch.testing.assert_close(our_logits(our_model(copy)[0]), our_logits(our_model(base)[0]))


def test_shards_and_their_index_are_read(base, tmp_path):
    plain = NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(our_logits(our_model(tmp_path)[0]), our_logits(our_model(base)[0]))


def copy_of(base: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(kind: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if kind == "missing":
        del tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    elif kind == "left over":
        tensors["backbone.layers.9.norm.weight"] = torch.ones(64)
    elif kind == "misshapen":
        tensors["backbone.layers.2.mixer.q_proj.weight"] = torch.ones(64, 32)
    elif kind == "unused":
        tensors["mtp.layers.0.norm.weight"] = torch.ones(64)
    save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "absent":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lacks 1 tensors, first backbone\.layers\.1\.mixer\.experts\.3\.up_proj\.weight"),
        ("left over", r"1 tensors, first backbone\.layers\.9\.norm\.weight"),
        ("misshapen", r"q_proj\.weight in .* is \(64, 32\), and config\.json makes it \(64, 64\)"),
        ("truncated", r"model\.safetensors cannot be read"),
        ("absent", r"has neither model\.safetensors nor .*reinit_weights"),
    ],
)  # fmt: skip
def test_a_broken_base_is_refused_by_name(base, tmp_path, kind, message):
    copy = copy_of(base, tmp_path)
    edit(kind, copy)
    with pytest.raises(CheckpointError, match=message):
        our_model(copy)


def test_the_prediction_head_is_not_read(base, tmp_path):
    copy = copy_of(base, tmp_path)
    edit("unused", copy)
    torch.testing.assert_close(our_logits(our_model(copy)[0]), our_logits(our_model(base)[0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "model_type 'llama', and nemo_ray trains nemotron_h only"),
        ('{"model_type": "nemotron_h", "hidden_size": "big"}', "no usable nemotron_h config"),
        ('{"model_type": "nemotron_h", "tie_word_embeddings": true}', "ties lm_head"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_model_config(str(tmp_path))


def test_parameters_are_counted(base):
    model, _ = our_model(base, AdapterSection(**ALL_TARGETS))
    counts = count_parameters(model)
    plain = NemotronHForCausalLM(read_model_config(str(base)))
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert counts["total"] - lora == sum(p.numel() for p in plain.parameters())
    assert counts["trainable"] == lora > 0


def test_a_large_model_is_saved_in_files_with_an_index(base, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 100_000)
    model, _ = our_model(base)
    save_model(model, model.config, SavedBase(str(base)), tmp_path / "out", torch.float32, write=True)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(base / "model.safetensors").keys()
    torch.testing.assert_close(our_logits(our_model(tmp_path / "out")[0]), our_logits(model))


def test_the_chat_template_of_the_training_comes_along(base, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    model, _ = our_model(base)
    saved = SavedBase(str(base), chat_template=str(template))
    save_model(model, model.config, saved, tmp_path / "out", torch.float32, write=True)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
