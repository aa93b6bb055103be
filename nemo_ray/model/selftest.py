"""Refuses to train a wrong model: checks on the loaded model, as it will train, before the first step.

1. Isolation: of two documents in a pack, changing the first one's last token must not move the second's
   logits.
2. Train and eval mode agree: what trains is what serves.
3. LoRA acts: every factor gets a gradient, and there are as many expert adapters as MoE layers times targets.

Every rank calls it together. The model is left as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_ray.errors import PatchError
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.lora import LoraLinear, LoraTargets, lora_parameters

# Largest change allowed, as a share of the logits' scale. A leak moves them by tenths of it; what remains in
# float32 is the order of sums in grouped matmuls, in bf16 rounding on top.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
DOCUMENT_TOKENS = (37, 91)


def self_test(
    model: nn.Module, targets: LoraTargets | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Run all checks.

    Raises: PatchError naming the check, the figure and the tolerance.
    """
    if targets is not None:
        _check_expert_count(model, targets)
    ids = torch.randint(
        0, model.config.vocab_size, (1, sum(DOCUMENT_TOKENS)), generator=torch.Generator().manual_seed(7)
    )
    with _no_dropout(model), _perturbed_lora(model, device):
        for mode in ("train", "eval"):
            model.train(mode == "train")
            _check_isolation(model, ids, device, TOLERANCE[dtype], mode)
        _check_modes_agree(model, ids, device, TOLERANCE[dtype])
        if targets is not None:
            _check_gradients(model, ids, device)
    model.train()


def _logits(model: nn.Module, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    return model.packed_logits(PackedBatch.from_lengths(ids.to(device), [list(DOCUMENT_TOKENS)]))


@torch.no_grad()
def _check_isolation(
    model: nn.Module, ids: torch.Tensor, device: torch.device, tolerance: float, mode: str
) -> None:
    first = DOCUMENT_TOKENS[0]
    changed = ids.clone()
    changed[0, first - 1] = (changed[0, first - 1] + 1) % model.config.vocab_size
    before, after = _logits(model, ids, device), _logits(model, changed, device)
    scale = float(before.std())
    moved = float((before - after)[:, first:].abs().max()) / scale
    if not moved <= tolerance:
        raise PatchError(
            f"self-test: packed documents see each other in {mode} mode: the second document's logits moved "
            f"by {moved:.2e} of their scale when the first one's last token changed (at most {tolerance:.0e})"
        )
    if not float((before - after)[:, first - 1].abs().max()) > 0:
        raise PatchError(f"self-test: in {mode} mode the logits do not depend on the input at all")


@torch.no_grad()
def _check_modes_agree(model: nn.Module, ids: torch.Tensor, device: torch.device, tolerance: float) -> None:
    model.train()
    training = _logits(model, ids, device)
    model.eval()
    serving = _logits(model, ids, device)
    off = float((training - serving).abs().max() / serving.std())
    if not off <= tolerance:
        raise PatchError(
            f"self-test: train and eval mode disagree by {off:.2e} of the logits' scale "
            f"(at most {tolerance:.0e})"
        )


def _check_gradients(model: nn.Module, ids: torch.Tensor, device: torch.device) -> None:
    model.train()
    _logits(model, ids, device).logsumexp(-1).sum().backward()
    for name, parameter in lora_parameters(model).items():
        gradient = parameter.grad
        if gradient is None:
            raise PatchError(f"self-test: {name} gets no gradient: the forward pass does not go through it")
        norm = gradient.norm()
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not 0 < norm < float("inf"):
            raise PatchError(f"self-test: the gradient of {name} has norm {norm}")
    model.zero_grad(set_to_none=True)


def _check_expert_count(model: nn.Module, targets: LoraTargets) -> None:
    banks = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    found = sum(getattr(bank, f"{side}_lora_A") is not None for bank in banks for side in ("up", "down"))
    kinds = {name.rpartition(".")[2] for name in targets.parameters}
    if found != len(targets.parameters):
        raise PatchError(
            f"self-test: {found} expert adapters are in place, {len(targets.parameters)} were asked for "
            f"({len(banks)} MoE layers, {', '.join(sorted(kinds)) or 'no targets'})"
        )


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    kept = [layer.dropout for layer in layers]
    try:
        for layer in layers:
            layer.dropout = 0.0
        yield
    finally:
        for layer, dropout in zip(layers, kept, strict=True):
            layer.dropout = dropout


@contextmanager
def _perturbed_lora(model: nn.Module, device: torch.device) -> Iterator[None]:
    """LoRA B starts at zero, where A has no gradient and no adapter acts: give B small values meanwhile."""
    kept = []
    generator = torch.Generator(device).manual_seed(11)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_B"):
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                kept.append((local, local.clone()))
                local.add_(torch.empty_like(local).normal_(0, 0.02, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for local, values in kept:
                local.copy_(values)
