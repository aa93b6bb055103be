"""An adapter with a pair of factors for each routed expert, as servers want it that know no 3-D banks.

vLLM packs the experts' factors itself, from keys `...experts.N.up_proj` and `...experts.N.down_proj`. It
wants both projections of every expert, of one rank, and knows one scaling for a whole adapter. So a
projection that is not targeted gets factors of zero, smaller ranks are filled up with zeros, and a scaling
that differs goes into B.

Shapes: E experts, R rank, I inputs, O outputs.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nemo_ray.errors import ConfigError
from nemo_ray.export.output import write_text
from nemo_ray.export.shards import write_file
from nemo_ray.model import keys
from nemo_ray.model.adapter_reader import AdapterFiles, LoraFactors
from nemo_ray.model.saving import TOKENIZER_FILES
from nemo_ray.peft_config import CONFIG_NAME, TENSORS_NAME

Layout = dict[str, tuple[str, tuple[int, ...]]]


def check_per_expert(adapter: AdapterFiles) -> None:
    """Refuse an adapter that gains nothing, or that would lose a part."""
    if not adapter.experts:
        raise ConfigError(
            f"--per-expert-keys: {adapter.folder} has no factors of routed experts; servers read it as it is"
        )
    if adapter.modules_to_save:
        raise ConfigError(
            f"--per-expert-keys: {adapter.folder} holds {next(iter(adapter.modules_to_save))} whole, which "
            "servers do not take in an adapter; use --merge"
        )


def num_bytes(adapter: AdapterFiles) -> int:
    """Size of the file of factors."""
    return sum(4 * math.prod(shape) for _, shape in _layout(adapter).values())


def write_per_expert(adapter: AdapterFiles, folder: Path) -> None:
    """Write the adapter into an empty folder, float32, a bank at a time."""
    write_file(folder / TENSORS_NAME, _layout(adapter), _tensors(adapter))
    write_text(folder / CONFIG_NAME, json.dumps(_config(adapter), indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (adapter.folder / name).exists():
            shutil.copyfile(adapter.folder / name, folder / name)


def _all(adapter: AdapterFiles) -> Iterator[tuple[str, LoraFactors | None, tuple[int, ...]]]:
    """(path, factors or None for zeros, shape of the weight); both projections of a bank that has one."""
    for path, factors in adapter.linear.items():
        yield path, factors, factors.shape
    for bank in dict.fromkeys(path.rpartition(".")[0] for path in adapter.experts):
        for side, other in (("up_proj", "down_proj"), ("down_proj", "up_proj")):
            path = f"{bank}.{side}"
            if path in adapter.experts:
                yield path, adapter.experts[path], adapter.experts[path].shape
            else:
                experts, out_features, in_features = adapter.experts[f"{bank}.{other}"].shape
                yield path, None, (experts, in_features, out_features)


def _rank(adapter: AdapterFiles) -> int:
    return max(factors.rank for factors in [*adapter.linear.values(), *adapter.experts.values()])


def _scaling(config: Mapping[str, Any]) -> float:
    """What most targets are scaled by: lora_alpha and r of the configuration."""
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]))


def _layout(adapter: AdapterFiles) -> Layout:
    rank, layout = _rank(adapter), Layout()
    for path, _, shape in _all(adapter):
        for name in _module_paths(path, shape):
            layout[keys.peft_linear(f"{name}.lora_A")] = ("F32", (rank, shape[-1]))
            layout[keys.peft_linear(f"{name}.lora_B")] = ("F32", (shape[-2], rank))
    return layout


def _module_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    if len(shape) == 2:
        return [path]
    bank, _, side = path.rpartition(".")
    return [f"{bank}.{expert}.{side}" for expert in range(shape[0])]


def _tensors(adapter: AdapterFiles) -> Iterator[torch.Tensor]:
    """A and B of every module, in the order of `_layout`."""
    rank, scaling = _rank(adapter), _scaling(adapter.config)
    for _, factors, shape in _all(adapter):
        modules = shape[0] if len(shape) == 3 else 1
        if factors is None:
            A, B = torch.zeros(1, rank, shape[-1]), torch.zeros(1, shape[-2], rank)
            A, B = A.expand(modules, -1, -1), B.expand(modules, -1, -1)
        else:
            missing = rank - factors.rank
            A = F.pad(factors.A.float().view(modules, factors.rank, shape[-1]), (0, 0, 0, missing))
            B = factors.B.float().reshape(modules, shape[-2], factors.rank) * (factors.scaling / scaling)
            B = F.pad(B, (0, missing))
        for index in range(modules):
            yield A[index]
            yield B[index]


def _config(adapter: AdapterFiles) -> dict[str, Any]:
    """One rank and one scaling for all; targets by the last part of their names."""
    config = dict(adapter.config)
    rank, scaling = _rank(adapter), _scaling(config)
    config["r"] = rank
    config["lora_alpha"] = scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
    config["rank_pattern"], config["alpha_pattern"] = {}, {}
    config["target_parameters"] = None
    config["target_modules"] = sorted({path.rpartition(".")[2] for path, _, _ in _all(adapter)})
    return config
