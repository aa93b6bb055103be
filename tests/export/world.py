"""Tiny bases of several files, and adapters on them with random factors."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.adapter import save_adapter
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.model.saving import SavedBase
from tests.model.shapes import CPU, randomize_lora, tiny_config

IDS = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj")
BANKS = ("experts.up_proj", "experts.down_proj")
ADAPTERS = {
    "everything": {"lora_target_linear": True, "lora_target_parameters": BANKS, "peft_use_rslora": True},
    "experts only": {"lora_target_parameters": BANKS},
    "one projection": {"lora_target_parameters": ("experts.down_proj",)},
    "attention and mamba": {"lora_target_modules": LINEAR},
    "one block": {"lora_target_modules": (r".*layers\.2\.mixer\.[qk]_proj",), "lora_alpha": 3.0},
}


def save_base(folder: Path, latent: int | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A random model in NVIDIA's layout: files of at most 100 KB, a prediction head, companions."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(tiny_config(latent=latent)).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    mtp = {"mtp.layers.0.norm.weight": torch.rand(64).to(dtype)}
    save_file(load_file(folder / last) | mtp, folder / last, metadata={"format": "pt", "from": "a test"})
    index["weight_map"] |= dict.fromkeys(mtp, last)
    index_file.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of the base"}')
    (folder / "configuration_nemotron_h.py").write_text("# remote code\n")
    return folder


def adapter_on(base: Path, folder: Path, **keys: object) -> Path:
    """An adapter with random factors, as training writes it."""
    section = AdapterSection(**({"adapter": "lora", "lora_r": 4} | keys))
    model, targets = build(read_model_config(str(base)), section, Precision(), CPU)
    fill(model, str(base), seed=0, device=CPU, adapter_seed=1)
    randomize_lora(model)
    save_adapter(model, section, targets, SavedBase(str(base)), folder, write=True)
    return folder


def our_logits(base: Path, adapter: dict[str, object] | None = None) -> torch.Tensor:
    """Logits of our model with the same adapter as `adapter_on` writes, or without one."""
    section = AdapterSection(**({"adapter": "lora", "lora_r": 4} | adapter)) if adapter else AdapterSection()
    model, _ = build(read_model_config(str(base)), section, Precision(), CPU)
    fill(model, str(base), seed=0, device=CPU, adapter_seed=1)
    randomize_lora(model)
    with torch.no_grad():
        return model.eval().packed_logits(PackedBatch.from_lengths(IDS, [[IDS.shape[1]]]))


def plain_logits(folder: Path) -> torch.Tensor:
    """Logits of transformers' own model, in float32."""
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files."""
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}
