"""From a folder in NVIDIA's layout to a model that is ready to train: `build` on meta, then `fill`.

Between the two, the caller may shard the parameters: `fill` then reads only this rank's rows of each tensor,
so that a rank's memory holds its own part and one tensor's rows, never the whole model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemo_ray.bare import is_bare
from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.model import keys
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.init import initial_values
from nemo_ray.model.linear import BaseLinear
from nemo_ray.model.lora import LoraTargets, apply_lora, initial_factors, lora_parameters
from nemo_ray.model.patches import patch_model
from nemo_ray.model.quant import QuantizedWeight, Workspace
from nemo_ray.model.sharding import RowShard, local_rows

# Of values that are quantized together. bitsandbytes' way on a CPU takes some 70 bytes for each value.
QUANTIZED_AT_ONCE_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}


def read_model_config(base_model: str) -> NemotronHConfig:
    """Read config.json of a Nemotron-H folder.

    Raises: ConfigError where there is none, or it is of another architecture.
    """
    path = Path(base_model) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"base_model: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"base_model: {path} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "nemotron_h":
        found = raw.get("model_type") if isinstance(raw, dict) else None
        raise ConfigError(f"base_model: {path} has model_type {found!r}, and nemo_ray trains nemotron_h only")
    try:
        config = NemotronHConfig.from_pretrained(base_model, local_files_only=True)
    except Exception as error:  # transformers raises several kinds, some of them its own
        raise ConfigError(f"base_model: {path} is no usable nemotron_h config: {error}") from None
    if config.tie_word_embeddings:
        raise ConfigError(f"base_model: {path} ties lm_head to the embeddings, which Nemotron-H never does")
    return config


@dataclass(frozen=True)
class Precision:
    """In what the base is held, and in what it computes.

    Attributes:
        weights: dtype of the base's dense parameters. A_log, D, dt_bias and the router are float32.
        compute: dtype of the activations.
        linears_4bit, experts_4bit: hold the blocks' linear layers, and the routed experts, in NF4.
    """

    weights: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    linears_4bit: bool = False
    experts_4bit: bool = False


_ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias", ".gate.weight")


def build(
    config: NemotronHConfig, adapter: AdapterSection, precision: Precision, device: torch.device
) -> tuple[NemotronHForCausalLM, LoraTargets | None]:
    """Make the patched model on meta, in 4 bits and with LoRA in place where that is asked for.

    Args:
        device: where it will run (decides about kernels); the parameters are on meta until `fill`.

    Returns: the model, and what LoRA was put on (None: all parameters train).
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    # Parameters only: `.to(dtype)` would round the router's float32 bias buffer.
    for name, parameter in model.named_parameters():
        keep = name.endswith(_ALWAYS_FLOAT32)
        parameter.data = parameter.data.to(torch.float32 if keep else precision.weights)
    patch_model(model, device, precision.compute)
    _quantize(model, precision)
    targets = apply_lora(model, adapter) if adapter.adapter else None
    return model, targets


def _quantize(model: nn.Module, precision: Precision) -> None:
    """Put 4-bit weights in place of dense ones, on meta."""
    workspace = Workspace()
    for module in model.modules():
        if precision.linears_4bit and isinstance(module, BaseLinear):
            names: tuple[str, ...] = ("weight",)
        elif precision.experts_4bit and isinstance(module, RoutedExperts):
            names = ("up_proj", "down_proj")
        else:
            continue
        for name in names:
            dense = getattr(module, name)
            delattr(module, name)
            setattr(module, name, QuantizedWeight(tuple(dense.shape), dense.device, workspace))


class Checkpoint:
    """The tensors of a model folder, by NVIDIA's keys; safetensors only, read by slices."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._open: tuple[Path, safe_open] | None = None
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"base_model: {index} is no index of weights: {error!r}") from None
            for name in weight_map.values():
                if not is_bare(name) or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"base_model: {index} names {name!r}, no safetensors file beside it"
                    )
            self.files = {key: self.folder / name for key, name in weight_map.items()}
        elif single.exists():
            self.files = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise CheckpointError(
                f"base_model: {self.folder} has neither model.safetensors nor model.safetensors.index.json "
                "(other formats are not read); for random weights set reinit_weights: true"
            )
        self._rename_old_spellings()

    def _rename_old_spellings(self) -> None:
        self._name_on_disk = {key: key for key in self.files}
        for right, old_names in keys.OLD_SPELLINGS.items():
            for old in old_names:
                if right not in self.files and old in self.files:
                    self.files[right] = self.files.pop(old)
                    self._name_on_disk[right] = old

    def _file(self, path: Path) -> safe_open:
        """The shard, open; one at a time, since the pages of an open one count as this process's memory."""
        if self._open is None or self._open[0] != path:
            try:
                self._open = (path, safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"base_model: {path} cannot be read: {error}") from None
        return self._open[1]

    def rows(self, key: str, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Rows [start, stop) of the tensor `key`, which must be of `shape`."""
        path = self.files[key]
        view = self._file(path).get_slice(self._name_on_disk[key])
        if tuple(view.get_shape()) != shape:
            raise CheckpointError(
                f"base_model: {key} in {path} is {tuple(view.get_shape())}, and config.json makes it {shape}"
            )
        return view[start:stop]


def _base_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """Weights and buffers of the base, without LoRA factors; one in 4 bits is one, under its own name."""
    quantized = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)
    }
    yield from quantized.items()
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if "lora_" not in leaf and prefix not in quantized:
            yield name, parameter
    yield from model.named_buffers()


class Rows(Protocol):
    """Where a base weight's rows come from: fills `out` (rows, ...) with those from row `first` on."""

    def __call__(self, name: str, shape: tuple[int, ...], first: int, out: torch.Tensor) -> None: ...


@torch.no_grad()
def fill(
    model: NemotronHForCausalLM, base_model: str | None, seed: int, device: torch.device, adapter_seed: int
) -> None:
    """Give every parameter and buffer its values, on `device`.

    Weights in 4 bits are quantized some hundred MiB at a time, never a whole one.

    Args:
        base_model: folder to read; None draws random weights from `seed`, the same for any sharding.
        adapter_seed: LoRA factors are drawn from it, whatever the sharding.

    Raises: CheckpointError for a missing, left-over or misshapen tensor.
    """
    rows = _random_rows(model, seed) if base_model is None else _stored_rows(model, base_model)
    model.to_empty(device=device)
    shards: Mapping[str, RowShard] = getattr(model, "row_shards", {})
    for name, weight in _base_weights(model):
        if isinstance(weight, QuantizedWeight):
            _fill_quantized(name, weight, rows, model.compute_dtype, shards)
            continue
        local, first = _own_rows(name, weight, shards)
        if local.numel():
            rows(name, tuple(shards[name].shape if name in shards else weight.shape), first, local)
    initial_factors(model, adapter_seed)


def _own_rows(name: str, weight: torch.Tensor, shards: Mapping[str, RowShard]) -> tuple[torch.Tensor, int]:
    """This rank's rows of a weight, and the first one's number."""
    if name not in shards:
        return local_rows(weight)
    return weight.data[: shards[name].count], shards[name].first


def _fill_quantized(
    name: str, weight: QuantizedWeight, rows: Rows, dtype: torch.dtype, shards: Mapping[str, RowShard]
) -> None:
    """Read this rank's groups of a weight in `dtype`, some at a time, and quantize them in place."""
    own = (
        _own_rows(f"{name}.{leaf}", getattr(weight, leaf), shards) for leaf in ("packed", "codes", "nested")
    )
    stored, first = zip(*own, strict=True)
    num_local, first_group = stored[0].shape[0], first[0]
    rows_per_group = weight.shape[0] // weight.num_groups
    at_once_bytes = QUANTIZED_AT_ONCE_BYTES[stored[0].device.type]
    step = max(1, at_once_bytes // (weight.group_size * dtype.itemsize))
    for start in range(0, num_local, step):
        groups = min(step, num_local - start)
        shape = (groups * rows_per_group, *weight.shape[1:])
        values = torch.empty(shape, dtype=dtype, device=stored[0].device)
        rows(name, tuple(weight.shape), (first_group + start) * rows_per_group, values)
        for part, made in zip(stored, weight.quantize(values.view(groups, -1)), strict=True):
            part[start : start + groups] = made


def _random_rows(model: NemotronHForCausalLM, seed: int) -> Rows:
    def rows(name: str, shape: tuple[int, ...], first: int, out: torch.Tensor) -> None:
        initial_values(out, name, first, shape, model.config, seed)

    return rows


def _stored_rows(model: NemotronHForCausalLM, base_model: str) -> Rows:
    checkpoint, num_experts = Checkpoint(base_model), model.config.n_routed_experts
    _check_keys(model, checkpoint, num_experts)

    def rows(name: str, shape: tuple[int, ...], first: int, out: torch.Tensor) -> None:
        place = keys.stored(name, num_experts)
        if place.stacked:
            for row, values in enumerate(out):
                values.copy_(checkpoint.rows(place.keys[first + row], 0, shape[1], shape[1:]))
        else:
            out.copy_(checkpoint.rows(place.keys[0], first, first + out.shape[0], shape))

    return rows


def _check_keys(model: nn.Module, checkpoint: Checkpoint, num_experts: int) -> None:
    wanted = {key for name, _ in _base_weights(model) for key in keys.stored(name, num_experts).keys}
    found = {key for key in checkpoint.files if not keys.is_unused(key)}
    for problem, names in (("lacks", wanted - found), ("has, and the model does not,", found - wanted)):
        if names:
            raise CheckpointError(
                f"base_model: {checkpoint.folder} {problem} {len(names)} tensors, first {sorted(names)[0]}"
            )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, whole model whatever the sharding: {"total", "trainable", "routed_experts"}."""
    banks = tuple(name for name, module in model.named_modules() if isinstance(module, RoutedExperts))
    buffers = {name for name, _ in model.named_buffers()}
    base = [(name, w.shape.numel()) for name, w in _base_weights(model) if name not in buffers]
    lora = [(name, factor.numel()) for name, factor in lora_parameters(model).items()]
    return {
        "total": sum(size for _, size in base + lora),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "routed_experts": sum(size for name, size in base + lora if banks and name.startswith(banks)),
    }
