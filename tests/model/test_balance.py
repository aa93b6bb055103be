"""Loads of experts are counted as they are, whatever is recomputed, and in training only."""

import pytest
import torch

from nemo_ray.model.balance import max_violation
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.train.loss import bind_loss
from tests.model.shapes import tiny_config, tiny_model

IDS = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(1))


def expected(model) -> float:
    """From the choices that the experts are called with."""
    chosen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].flatten()))
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    ]
    train(model)
    for hook in hooks:
        hook.remove()
    ratios = [torch.bincount(c, minlength=8).max() / (c.numel() / 8) - 1 for c in chosen[:2]]
    return float(sum(ratios) / 2)


def train(model) -> None:
    batch = PackedBatch.from_lengths(IDS, [[20, 28]])
    model.target_log_probs(batch, IDS).sum().backward()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("latent", [None, 32], ids=["plain", "latent"])
def test_the_busiest_expert(latent: int | None, recompute: bool) -> None:
    model = tiny_model(tiny_config(latent=latent), {"adapter": "lora", "lora_target_linear": True}).train()
    bind_loss(model)
    for block in model.model.layers:
        block.recompute = recompute
    assert max_violation(model) is None
    wanted = expected(model)
    assert wanted > 0.2 and float(max_violation(model)) == pytest.approx(wanted, rel=1e-5)
    train(model)
    train(model)
    assert float(max_violation(model)) == pytest.approx(wanted, rel=1e-5), "counted anew after each call"
    model.eval()
    with torch.no_grad():
        model.packed_logits(PackedBatch.from_lengths(IDS, [[48]]))
    assert float(max_violation(model)) <= 0, "nothing was counted"


def test_a_model_without_experts() -> None:
    model = tiny_model(tiny_config(pattern="M*-"))
    assert max_violation(model) is None
