"""A model on the kernels, interpreted, computes what it computes on their references."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model import kernels
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.train.loss import bind_loss, next_token_targets
from tests.model.shapes import ALL_TARGETS, CPU, randomize_lora, tiny_config

CASES = {
    "lora": (ALL_TARGETS, Precision(), None),
    "latent experts, 4 bits": (ALL_TARGETS, Precision(linears_4bit=True, experts_4bit=True), 32),
    "all weights": ({}, Precision(), None),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_gradients_are_the_references(case, recompute, monkeypatch):
    adapter, precision, latent = case
    model, _ = build(tiny_config(latent=latent), AdapterSection(**adapter), precision, CPU)
    bind_loss(model)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    randomize_lora(model)
    model.train()
    for block in model.model.layers:
        block.recompute = recompute
    ids = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths(ids, [[1, 13, 26]])
    targets = next_token_targets(ids, batch.seq_idx)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(2))
    results, served = [], []
    for serve in (True, False):
        monkeypatch.setattr(kernels, "serve", lambda tensor, serve=serve: served.append(serve) or serve)
        model.zero_grad()
        log_probs = model.target_log_probs(batch, targets)
        (log_probs * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((log_probs.detach(), grads))
    assert served.count(True) == served.count(False) > 20
    (found, found_grads), (expected, expected_grads) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (found_grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name
