"""An adapter merged into its base, file by file: the same files, the same keys, only its targets changed.

W + scaling * B A is computed in float32 and rounded once to the type that the base has on disk. So an adapter
that was trained on the base in 4 bits is merged into the weights as they were before.

Shapes: E experts, R rank, I inputs, O outputs.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.export.output import write_text
from nemo_ray.export.shards import DTYPES, Shard, read_shard, rewrite
from nemo_ray.model import keys
from nemo_ray.model.adapter_reader import AdapterFiles
from nemo_ray.model.load import Checkpoint, read_model_config
from nemo_ray.model.saving import TOKENIZER_FILES

INDEX_NAME = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".nemo")
_ELEMENTS_AT_ONCE = 2**22

Say = Callable[[str], None]
Place = tuple[str, int | None]
"""A parameter's name in memory, and the row of a stacked one, as `keys.in_memory` gives them."""


@dataclass(frozen=True)
class Merge:
    """What will be written, known to fit before anything is.

    Attributes:
        changed: key of the base -> what of the adapter changes it: the target's path, and the expert.
    """

    base: Path
    config: NemotronHConfig
    adapter: AdapterFiles
    shards: tuple[Shard, ...]
    changed: Mapping[str, Place]

    @property
    def num_bytes(self) -> int:
        return sum(shard.path.stat().st_size for shard in self.shards)

    @property
    def num_mtp_tensors(self) -> int:
        return sum(keys.is_unused(key) for shard in self.shards for key in shard.tensors)


def plan_merge(base_model: str, adapter: AdapterFiles) -> Merge:
    """Hold base and adapter against each other, by their headers alone.

    Raises: ConfigError for a base that is not nemotron_h or is quantized on disk; CheckpointError for a
        broken or incomplete base, which names the file or tensor, and for an adapter that does not fit it,
        which names the first target that differs, with both shapes.
    """
    base, config = Path(base_model), read_model_config(base_model)
    shards = _read_shards(base)
    _check_base(base, config, shards)
    on_disk = {keys.in_memory(key): key for shard in shards for key in shard.tensors}
    tensors = {key: tensor for shard in shards for key, tensor in shard.tensors.items()}
    changed: dict[str, Place] = {}
    for target, expert, place, shape in _targets(adapter):
        key = on_disk.get(place)
        found = tensors[key].shape if key is not None else None
        if key is None or found != shape:
            there = f"{key} is {found}" if key else f"there is no {_stored_key(*place)}"
            raise CheckpointError(
                f"adapter: {target} of {adapter.folder} is for a weight of {shape}, and in {base} {there}; "
                "name the base that it was trained on by --base-model"
            )
        if tensors[key].dtype not in DTYPES:
            raise CheckpointError(
                f"base_model: {key} of {base} is stored as {tensors[key].dtype}, which nothing can be merged "
                "into; name the model in bfloat16 by --base-model"
            )
        if key in changed:
            raise CheckpointError(f"adapter: {adapter.folder} changes {key} twice, by {target} too")
        changed[key] = (target, expert)
    return Merge(base, config, adapter, shards, changed)


def _targets(adapter: AdapterFiles) -> Iterator[tuple[str, int | None, Place, tuple[int, ...]]]:
    """(path of the target, expert, place of the weight, its shape), one for each tensor of a checkpoint."""
    for path, factors in adapter.linear.items():
        yield path, None, keys.in_memory(f"{path}.weight"), factors.shape
    for path, factors in adapter.experts.items():
        for expert in range(factors.shape[0]):
            yield path, expert, (path, expert), factors.shape[1:]
    for name in adapter.modules_to_save:
        yield name, None, (name, None), adapter.modules_to_save.shape(name)


def _stored_key(name: str, expert: int | None) -> str:
    return keys.stored(name, (expert or 0) + 1).keys[-1]


def _read_shards(base: Path) -> tuple[Shard, ...]:
    """The files of a checkpoint, in the order of their names; holds them against the index."""
    files = Checkpoint(str(base)).files
    shards = tuple(read_shard(path) for path in sorted(set(files.values())))
    index = base / INDEX_NAME
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for shard in shards:
            promised = {key for key, name in weight_map.items() if name == shard.path.name}
            for key in sorted(promised ^ shard.tensors.keys()):
                holds = "holds" if key in shard.tensors else "lacks"
                raise CheckpointError(f"base_model: {shard.path} {holds} {key}, against what {index} says")
    return shards


def _check_base(base: Path, config: NemotronHConfig, shards: tuple[Shard, ...]) -> None:
    """Every tensor that config.json makes is there, in its shape, and no other."""
    if config.to_dict().get("quantization_config"):
        raise ConfigError(
            f"base_model: {base / 'config.json'} has a quantization_config; an adapter is merged into the "
            "weights themselves: name the model in bfloat16 by --base-model"
        )
    found = {
        key: tensor.shape
        for shard in shards
        for key, tensor in shard.tensors.items()
        if not keys.is_unused(key)
    }
    places = {keys.in_memory(key): key for key in found}
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        stacked = keys.stored(name, 1).stacked
        shape = tuple(tensor.shape[1:] if stacked else tensor.shape)
        for expert in range(tensor.shape[0]) if stacked else (None,):
            key = places.pop((name, expert), None)
            if key is None:
                raise CheckpointError(f"base_model: {base} lacks {_stored_key(name, expert)}")
            if found[key] != shape:
                raise CheckpointError(
                    f"base_model: {key} in {base} is {found[key]}, and config.json makes it {shape}"
                )
    if places:
        raise CheckpointError(
            f"base_model: {base} has, and the model does not, {len(places)} tensors, first "
            f"{min(places.values())}"
        )


class _Factors:
    """Factors as they are asked for; those of one layer are kept, since its experts take turns."""

    def __init__(self, adapter: AdapterFiles) -> None:
        self._adapter = adapter
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def of(self, target: str, expert: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (R, I) and B (O, R), float32, and the scaling."""
        layer = target.rpartition(".")[0]
        if target not in self._held:
            if any(path.rpartition(".")[0] != layer for path in self._held):
                self._held.clear()
            factors = (self._adapter.linear if expert is None else self._adapter.experts)[target]
            self._held[target] = (factors.A.float(), factors.B.float(), factors.scaling)
        A, B, scaling = self._held[target]
        return (A, B, scaling) if expert is None else (A[expert], B[expert], scaling)


def _add(weight: torch.Tensor, factors: _Factors, target: str, expert: int | None) -> None:
    """weight (O, I) += scaling * B A in place, some rows at a time, in float32 and rounded once."""
    A, B, scaling = factors.of(target, expert)
    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        part.copy_(torch.addmm(part.float(), B[start : start + rows], A, alpha=scaling))


def write_merged(merge: Merge, folder: Path, say: Say) -> None:
    """Write the merged checkpoint into an empty folder, one file of the base after the other."""
    factors = _Factors(merge.adapter)
    for shard in merge.shards:
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {}
        for key in shard.tensors.keys() & merge.changed.keys():
            target, expert = merge.changed[key]
            if target in merge.adapter.modules_to_save:
                dtype = DTYPES[shard.tensors[key].dtype]
                changes[key] = partial(_replacement, merge.adapter, target, dtype)
            else:
                changes[key] = partial(_add, factors=factors, target=target, expert=expert)
        rewrite(shard, folder / shard.path.name, changes)
        say(f"{shard.path.name}: {len(changes)} of {len(shard.tensors)} tensors changed")
    _copy_companions(merge, folder)
    write_text(folder / "config.json", json.dumps(_config(merge), indent=2) + "\n")
    write_text(folder / "README.md", _readme(merge))
    written = [read_shard(folder / shard.path.name, "--output") for shard in merge.shards]
    assert all(new.header == old.header for new, old in zip(written, merge.shards, strict=True))


def _replacement(adapter: AdapterFiles, name: str, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return adapter.modules_to_save[name].to(dtype)


def _config(merge: Merge) -> dict[str, Any]:
    """The base's config.json with both spellings of the blocks: transformers reads one, vLLM the other."""
    raw: dict[str, Any] = json.loads((merge.base / "config.json").read_text(encoding="utf-8"))
    raw.setdefault("layers_block_type", list(merge.config.layers_block_type))
    raw.setdefault("hybrid_override_pattern", merge.config.hybrid_override_pattern)
    return raw


def _copy_companions(merge: Merge, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and whatever else the base has beside its weights."""
    own = {"config.json", "README.md"}
    for source in sorted(merge.base.iterdir()):
        is_weight = source.suffix in _WEIGHT_SUFFIXES
        if source.is_file() and not is_weight and source.name not in own and not source.name.startswith("."):
            shutil.copyfile(source, folder / source.name)
    for name in TOKENIZER_FILES:
        source = merge.adapter.folder / name
        if source.exists() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)


def _readme(merge: Merge) -> str:
    base = merge.adapter.config.get("base_model_name_or_path") or merge.base.name
    lines = [
        f"# {base} with an adapter merged in",
        "",
        f"{len(merge.changed)} tensors are changed, all others are the base's.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype="auto")',
        "for block in model.model.layers:",
        '    if block.block_type == "linear_attention":',
        "        block.mixer.time_step_limit = tuple(model.config.time_step_limit)",
        "```",
        "",
        "The loop sets the limit of Mamba's step as config.json has it, and as it was in training.",
        "transformers up to 5.23 clamps it at `time_step_min` instead.",
    ]
    if merge.num_mtp_tensors:
        lines += ["", mtp_note(merge)]
    return "\n".join(lines) + "\n"


def mtp_note(merge: Merge) -> str:
    """What it means that the multi-token prediction head comes along as it was."""
    return (
        f"The multi-token prediction head (`mtp.*`, {merge.num_mtp_tensors} in number) is copied as it is. "
        "It was trained with the base: speculative decoding with it stays exact, but fewer of its tokens are "
        "accepted."
    )
