"""The chunked loss against torch's cross entropy; targets never cross documents."""

import pytest
import torch
import torch.nn.functional as F

from nemo_ray.train import loss
from nemo_ray.train.loss import IGNORED, next_token_targets, token_log_probs


@pytest.mark.parametrize("chunk", [7, 16, 1024])
@pytest.mark.parametrize("train_weight", [False, True])
def test_values_and_gradients_equal_cross_entropy(chunk, train_weight, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 12, generator=generator, requires_grad=True)
    weight = torch.randn(30, 12, generator=generator).requires_grad_(train_weight)
    targets = torch.randint(0, 30, (40,), generator=generator)
    targets[::3] = IGNORED
    scale = torch.rand(40, generator=generator)
    results = []
    for ours in (True, False):
        hidden.grad = weight.grad = None
        if ours:
            log_probs = token_log_probs(hidden, weight, targets)
        else:
            log_probs = -F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="none")
        (log_probs * scale).sum().backward()
        results.append([log_probs, hidden.grad.clone(), weight.grad])
    for ours, plain in zip(*results, strict=True):
        if plain is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert not results[0][0][::3].any()


def test_targets_are_the_next_tokens_of_the_same_document():
    labels = torch.tensor([[5, 6, 7, 8, 9, IGNORED]])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert next_token_targets(labels, seq_idx).tolist() == [[6, 7, IGNORED, 9, IGNORED, IGNORED]]


def test_a_step_of_masked_packs_has_no_gradient():
    hidden = torch.randn(5, 4, requires_grad=True)
    token_log_probs(hidden, torch.randn(9, 4), torch.full((5,), IGNORED)).sum().backward()
    assert not hidden.grad.any()
