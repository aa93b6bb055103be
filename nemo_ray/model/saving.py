"""A trained model as files: weights in NVIDIA's layout, and what comes along from the base.

Every rank calls `save_model` together: sharded tensors are gathered one by one for rank 0, which writes.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import NemotronHConfig

from nemo_ray.model import keys
from nemo_ray.model.sharding import whole

SHARD_BYTES = 5 * 2**30
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "generation_config.json",
)


@dataclass(frozen=True)
class SavedBase:
    """What the written files say of the base, and take along from it.

    Attributes:
        folder: where its files are.
        name: as the user named it, folder or hub id; empty where that is the folder.
        revision: commit of a hub id.
        chat_template: file of the template that was trained with, where it is not the base's own.
    """

    folder: str
    name: str = ""
    revision: str | None = None
    chat_template: str | None = None

    def copy_tokenizer(self, folder: Path) -> None:
        """The tokenizer's files, and the chat template of the training."""
        for name in TOKENIZER_FILES:
            source = Path(self.folder) / name
            if source.exists():
                shutil.copyfile(source, folder / name)
        if self.chat_template is not None:
            shutil.copyfile(self.chat_template, folder / CHAT_TEMPLATE)


def save_model(
    model: nn.Module, config: NemotronHConfig, base: SavedBase, folder: Path, dtype: torch.dtype, write: bool
) -> None:
    """Write the whole model in NVIDIA's layout: weights in files of at most `SHARD_BYTES` with their index,
    config.json, the tokenizer's files. Rank 0 holds one file's tensors at a time."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shards = _cut_into_shards(tensors, dtype)
    weight_map: dict[str, str] = {}
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        state: dict[str, torch.Tensor] = {}
        for name, tensor in shard:
            value = whole(tensor)
            if write:
                state |= _stored_tensors(name, value, config.n_routed_experts, dtype)
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        if write:
            save_tensors(state, folder / f"model{part}.safetensors")
            weight_map |= dict.fromkeys(state, f"model{part}.safetensors")
    if not write:
        return
    if len(shards) > 1:
        size = sum(tensor.numel() * dtype.itemsize for _, tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    raw = json.loads((Path(base.folder) / "config.json").read_text(encoding="utf-8"))
    # vLLM reads the pattern, transformers the list: write both.
    raw["layers_block_type"] = list(config.layers_block_type)
    raw["hybrid_override_pattern"] = config.hybrid_override_pattern
    raw["num_nextn_predict_layers"] = 0  # the multi-token prediction head was not trained along
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    base.copy_tokenizer(folder)


Named = list[tuple[str, torch.Tensor]]


def _cut_into_shards(tensors: Named, dtype: torch.dtype) -> list[Named]:
    shards: list[Named] = [[]]
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if size + num_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += num_bytes
    return shards


def _stored_tensors(
    name: str, value: torch.Tensor, num_experts: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """NVIDIA's keys and tensors of one of ours."""
    if not name.endswith("e_score_correction_bias"):
        value = value.to(dtype)
    place = keys.stored(name, num_experts)
    if place.stacked:
        return dict(zip(place.keys, (row.contiguous() for row in value), strict=True))
    return {place.keys[0]: value.contiguous()}


def save_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors 0.8 leaves it readable by its owner only
