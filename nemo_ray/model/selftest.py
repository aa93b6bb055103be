"""Refuses to train a wrong model: checks on the loaded model, as it will train, before the first step.

1. Isolation: of two documents in a pack, changing the first must not move what the second gives: of the whole
   model, with documents that end on a chunk's edge, and of each block alone, with an edge inside a chunk.
2. Train and eval mode agree: what trains is what serves.
3. LoRA acts: every factor gets a gradient, and there are as many expert adapters as MoE layers times targets.

Why two kinds of isolation: inside a chunk, the scan's decays are differences of sums that run over both
documents, so the second document's last bits depend on the first one. In bf16 such a bit flips a choice of
experts some layers on, and the logits move as far as for a real leak (measured on a Nano-sized model with
random weights: 2e-3 after one block, 2.3 at the logits). With edges on chunks it is equal to the bit.

Every rank calls it together. The model is left as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_ray.errors import PatchError
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.lora import LoraLinear, LoraTargets, lora_parameters

# Largest movement allowed, as a share of the scale of what is compared. A leak moves it by tenths; what
# remains in float32 is the order of sums in grouped matmuls, in bf16 rounding on top.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
EDGE_INSIDE_A_CHUNK = (37, 91)


def self_test(
    model: nn.Module, targets: LoraTargets | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Run all checks on a model whose base is of `dtype`.

    Raises: PatchError naming the check, the figure and the tolerance.
    """
    if targets is not None:
        _check_expert_count(model, targets)
    chunk = model.config.chunk_size
    batch = _random_batch(model, (chunk, chunk), device)
    with _no_dropout(model), _perturbed_lora(model, device):
        for mode in ("train", "eval"):
            model.train(mode == "train")
            _check_isolation(model, batch, TOLERANCE[dtype], mode)
            _check_blocks(model, _random_batch(model, EDGE_INSIDE_A_CHUNK, device), dtype, mode)
        _check_modes_agree(model, batch, TOLERANCE[dtype])
        if targets is not None:
            _check_gradients(model, batch)
    model.train()


def random_ids(vocab_size: int, lengths: tuple[int, int]) -> torch.Tensor:
    """(1, sum of lengths) tokens, the same in every call."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size, (1, sum(lengths)), generator=generator)


def _random_batch(model: nn.Module, lengths: tuple[int, int], device: torch.device) -> PackedBatch:
    """One pack of two documents; the same on every rank."""
    ids = random_ids(model.config.vocab_size, lengths)
    return PackedBatch.from_lengths(ids.to(device), [list(lengths)])


def _movement(before: torch.Tensor, after: torch.Tensor, first: int, scale: torch.Tensor) -> float:
    """Largest change of a token from `first` on, as a share of `scale`; a token's is the RMS of its channels.

    Not the largest single value: over a quarter of a million of them, bf16 rounding alone reaches 0.13.
    """
    change = (before - after)[:, first:].float().square().mean(-1).sqrt()  # (1, T - first)
    return float(change.max() / scale.float().std())


@torch.no_grad()
def _check_isolation(model: nn.Module, batch: PackedBatch, tolerance: float, mode: str) -> None:
    first = int(batch.cu_seqlens[1])
    ids = batch.input_ids.clone()
    ids[:, :first] = (ids[:, :first] + 1) % model.config.vocab_size
    before, after = model.packed_logits(batch), model.packed_logits(replace(batch, input_ids=ids))
    moved = _movement(before, after, first, scale=before)
    if not moved <= tolerance:
        raise PatchError(
            f"self-test: packed documents see each other in {mode} mode: the second document's logits moved "
            f"by {moved:.2e} of their scale when the first one changed (at most {tolerance:.0e})"
        )
    if not _movement(before[:, :first], after[:, :first], 0, scale=before) > tolerance:
        raise PatchError(f"self-test: in {mode} mode the logits do not depend on the input")


@torch.no_grad()
def _check_blocks(model: nn.Module, batch: PackedBatch, dtype: torch.dtype, mode: str) -> None:
    """The same of each block that mixes tokens, on random hidden states."""
    first, tokens = int(batch.cu_seqlens[1]), batch.input_ids.shape[1]
    device = batch.input_ids.device
    draws = torch.randn(2, 1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(9))
    hidden, other = draws.to(device=device, dtype=dtype)
    changed = torch.cat([other[:, :first], hidden[:, first:]], dim=1)
    for number, block in enumerate(model.model.layers):
        if block.block_type not in ("linear_attention", "full_attention"):
            continue
        before, after = block(hidden, packed=batch), block(changed, packed=batch)
        moved = _movement(before, after, first, scale=before - hidden)
        if not moved <= TOLERANCE[dtype]:
            raise PatchError(
                f"self-test: packed documents see each other in block {number} ({block.block_type}) in "
                f"{mode} mode: the second document moved by {moved:.2e} of the block's scale when the first "
                f"one changed (at most {TOLERANCE[dtype]:.0e})"
            )


@torch.no_grad()
def _check_modes_agree(model: nn.Module, batch: PackedBatch, tolerance: float) -> None:
    model.train()
    training = model.packed_logits(batch)
    model.eval()
    serving = model.packed_logits(batch)
    off = _movement(training, serving, 0, scale=serving)
    if not off <= tolerance:
        raise PatchError(
            f"self-test: train and eval mode disagree by {off:.2e} of the logits' scale "
            f"(at most {tolerance:.0e})"
        )


def _check_gradients(model: nn.Module, batch: PackedBatch) -> None:
    """Each gradient is looked at and dropped as it comes: the set of them may not fit beside the base."""
    norms: dict[str, torch.Tensor] = {}

    def keep_norm(name: str, parameter: nn.Parameter) -> None:
        norm = parameter.grad.norm()
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        parameter.grad = None

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    handles = [
        parameter.register_post_accumulate_grad_hook(partial(keep_norm, name))
        for name, parameter in parameters.items()
    ]
    try:
        model.train()
        model.packed_logits(batch).logsumexp(-1).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    for name in parameters:
        if name not in norms:
            raise PatchError(f"self-test: {name} gets no gradient: the forward pass does not go through it")
        if not 0 < float(norms[name]) < float("inf"):
            raise PatchError(f"self-test: the gradient of {name} has norm {float(norms[name])}")


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
                kept.append((local, local.to("cpu", copy=True)))  # a GPU may have no room for a second set
                local.add_(torch.empty_like(local).normal_(0, 0.02, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for local, values in kept:
                local.copy_(values)
