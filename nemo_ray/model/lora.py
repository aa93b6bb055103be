"""LoRA on linear layers and routed experts: the layers, putting them in place, and their first values.

Modules that train whole beside it (head, embeddings) are put in place here too. The factors are float32
parameters beside a frozen base and are cast to the activations' dtype where they are used, so that a bf16
base pays no float32 matmuls. Which names match is targets.py's, the file format adapter.py's.

Source: Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023); the ways to start are PEFT's.

Shapes: R rank, I inputs, O outputs, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.init import draw_rows, generator_of
from nemo_ray.model.linear import BaseLinear, Deferred, linear, stand_in, whole
from nemo_ray.model.remake import Remake, unchanged
from nemo_ray.model.sharding import local_rows
from nemo_ray.targets import find_targets, saved_modules, strength_of


class _LoraGradient(torch.autograd.Function):
    """What a LoraLinear computes, as far as autograd sees it: keeps the cast factors, what A made of x, and
    what x is made of `again`."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, A, B, inner, layer: "LoraLinear", again: Remake):
        ctx.save_for_backward(A, B, inner, *again.sources)
        ctx.layer, ctx.make = layer, again.make
        return stand_in(x, *x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        A, B, inner, *sources = ctx.saved_tensors
        layer, x = ctx.layer, ctx.make(*sources)
        grad_rows, rows = grad.flatten(0, -2), x.flatten(0, -2)
        grad_inner = grad_rows @ B
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_inner @ A).addmm_(grad_rows, whole(layer.weight, grad.dtype)).view_as(x)
        grad_A = _factor_gradient(grad_inner, rows, layer.lora_A, layer.scaling)  # A came with it
        grad_B = _factor_gradient(grad_rows, inner, layer.lora_B)
        return grad_x, grad_A, grad_B, None, None, None, None, None


def _factor_gradient(
    x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """scaling * x.T y in the dtype of `factor`, whose shape it has; on a GPU one kernel, never rounded."""
    if x.is_cuda and x.dtype != factor.dtype:
        return torch.addmm(factor, x.T, y, out_dtype=factor.dtype, beta=0, alpha=scaling)
    return (x.T @ y).to(factor.dtype) * scaling


class LoraLinear(BaseLinear):
    """A frozen linear layer plus scaling * B A x. Keeps the base's parameter names."""

    def __init__(self, base: BaseLinear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base.weight, base.bias)
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor, again: Remake | None = None) -> torch.Tensor:
        """(..., I) -> (..., O); keeps x only where it is not made `again`."""
        if self.dropout and self.training:
            inner = linear(F.dropout(x, self.dropout), self.lora_A) * self.scaling
            return super().forward(x).add_(linear(inner, self.lora_B))
        with torch.no_grad():
            A, B = (self.lora_A * self.scaling).to(x.dtype), self.lora_B.to(x.dtype)
            inner = x.flatten(0, -2) @ A.T
        again = again or unchanged(x)
        product = _LoraGradient.apply(x, self.lora_A, self.lora_B, A, B, inner, self, again)
        return Deferred.apply(product, lambda: self._product(x, inner, B))

    def _product(self, x: torch.Tensor, inner: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        out = inner @ B.T
        if self.bias is not None:
            out += self.bias
        # Last, so that the sum is taken where the largest product is made, not in a pass over its output.
        out.addmm_(x.flatten(0, -2), whole(self.weight, x.dtype).T)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling}"


@dataclass(frozen=True)
class LoraTargets:
    """What an adapter trains.

    Attributes:
        modules: paths of linear layers with LoRA.
        parameters: paths of 3-D expert parameters with LoRA.
        saved: name -> path of the modules that are trained whole.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: Mapping[str, str] = field(default_factory=dict)


def apply_lora(model: nn.Module, adapter: AdapterSection) -> LoraTargets:
    """Freeze `model`, then put trainable factors on the adapter's targets in place, and float32 weights into
    what trains whole. They have no values yet: `initial_factors` gives factors their first.

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
    for name in modules:
        parent, _, child = name.rpartition(".")
        lora = LoraLinear(linears[name], *strength_of(adapter, name), adapter.lora_dropout)
        setattr(model.get_submodule(parent), child, lora)
    for name in parameters:
        bank, parameter = banks[name]
        bank.add_lora(parameter, *strength_of(adapter, name))
    saved = saved_modules(adapter)
    for path in saved.values():
        module = model.get_submodule(path)
        frozen = module.weight
        module.weight = nn.Parameter(torch.empty(frozen.shape, device=frozen.device, dtype=torch.float32))
    model.lora_init = adapter.peft_init_lora_weights
    model.draws_numbers = adapter.lora_dropout > 0
    return LoraTargets(tuple(modules), tuple(parameters), saved)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> factor, for every LoRA factor of `model`, in model order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name.rpartition(".")[2]}


@torch.no_grad()
def initial_factors(model: nn.Module, seed: int) -> None:
    """Give the factors that `apply_lora` put into `model` their first values, from `seed` and their names.

    `model` is whole or sharded by rows, which does not change a value. B A is zero in every case: A is random
    and B zero, or (orthogonal) both come from the two halves of one orthogonal matrix.
    """
    for name, parameter in lora_parameters(model).items():
        local, first = local_rows(parameter)
        rank, inputs = parameter.shape[-2:]
        if model.lora_init == "orthogonal":
            _orthogonal(local, name, first, tuple(parameter.shape), seed)
        elif name.endswith("lora_B"):
            local.zero_()
        elif model.lora_init == "gaussian":
            draw_rows(local, name, first, seed, _normal(1 / rank))
        else:  # kaiming with a = sqrt 5
            draw_rows(local, name, first, seed, _uniform(1 / math.sqrt(inputs)))


Draw = Callable[[torch.Tensor, torch.Generator], object]


def _normal(std: float) -> Draw:
    return lambda values, generator: values.normal_(0.0, std, generator=generator)


def _uniform(bound: float) -> Draw:
    return lambda values, generator: values.uniform_(-bound, bound, generator=generator)


def _orthogonal(local: torch.Tensor, name: str, first: int, shape: tuple[int, ...], seed: int) -> None:
    """Fill rows [first, first + len(local)) of the factor `name` of `shape`, (R, I), (O, R) or with E before.

    A's columns lie in the span of the even rows of an orthogonal (R, R), B's rows in that of the odd ones, so
    that B A = 0. Drawn whole on the CPU: a rank has its rows of what all ranks draw.
    """
    is_a = name.endswith("lora_A")
    rank, size = (shape[-2], shape[-1]) if is_a else (shape[-1], shape[-2])
    target, cpu = name.rpartition("lora_")[0], torch.device("cpu")

    def factor(index: int) -> torch.Tensor:
        square = torch.randn(rank, rank, generator=generator_of(seed, target, index, cpu))
        half = torch.linalg.qr(square).Q[0 if is_a else 1 :: 2]
        wide = torch.randn(size, rank // 2, generator=generator_of(seed, name, index, cpu)) @ half / 10
        return wide.T if is_a else wide

    if len(shape) == 3:
        for row, values in enumerate(local):
            values.copy_(factor(first + row))
    elif len(local):
        local.copy_(factor(0)[first : first + len(local)])
