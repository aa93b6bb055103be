"""LoRA on linear layers and routed experts: the layers themselves, and putting them in place.

The factors are float32 parameters beside a frozen base and are cast to the activations' dtype where they are
used, so that a bf16 base pays no float32 matmuls. Which names match is targets.py's, the file format
adapter.py's. Source: Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023).

Shapes: R rank, I inputs, O outputs, E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.linear import BaseLinear, linear
from nemo_ray.targets import find_targets


class LoraLinear(BaseLinear):
    """A frozen linear layer plus scaling * B A x. Keeps the base's parameter names."""

    def __init__(self, base: BaseLinear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base.weight, base.bias)
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        inner = linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + linear(inner * self.scaling, self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling}"


@dataclass(frozen=True)
class LoraTargets:
    """What LoRA was put on: module paths of linear layers, and parameter paths of 3-D experts."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def scaling_of(adapter: AdapterSection) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    rank = adapter.lora_r
    return adapter.lora_alpha / (math.sqrt(rank) if adapter.peft_use_rslora else rank)


def apply_lora(model: nn.Module, adapter: AdapterSection) -> LoraTargets:
    """Freeze `model` and put trainable factors on the adapter's targets, in place.

    Raises: ConfigError for a target that matches nothing or that cannot carry LoRA; it lists near names.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, BaseLinear)}
    banks = {
        f"{name}.{parameter}": (module, parameter)
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for parameter in ("up_proj", "down_proj")
    }
    modules, parameters = find_targets(adapter, linears, banks)
    scaling = scaling_of(adapter)
    for name in modules:
        parent, _, child = name.rpartition(".")
        lora = LoraLinear(linears[name], adapter.lora_r, scaling, adapter.lora_dropout)
        setattr(model.get_submodule(parent), child, lora)
    for name in parameters:
        bank, parameter = banks[name]
        bank.add_lora(parameter, adapter.lora_r, scaling)
    return LoraTargets(tuple(modules), tuple(parameters))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> factor, for every LoRA factor of `model`, in model order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name.rpartition(".")[2]}
