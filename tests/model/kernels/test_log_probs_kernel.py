"""The loss's kernel, interpreted, against its torch reference."""

import pytest
import torch

from nemo_ray.model.kernels import log_probs as kernels
from nemo_ray.train.loss import IGNORED, log_probs_reference_


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 4096, 5000, 9001])
def test_values_and_slopes(vocabulary, dtype, slope):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, vocabulary, generator=generator)).to(dtype)
    logits[3, 1] = 80.0  # a row that is sure of itself
    logits[4] -= 1000
    targets = torch.randint(0, vocabulary, (7,), generator=generator)
    targets[2] = IGNORED
    kernel, reference = logits.clone(), logits.clone()
    found = kernels.log_probs_(kernel, targets, IGNORED, slope)
    expected = log_probs_reference_(reference, targets, IGNORED, slope)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel, reference)
    assert torch.equal(kernel, logits) == (not slope) and not found[2]


def test_a_lone_possible_token():
    logits = torch.full((1, 5000), float("-inf"))
    logits[0, 4999] = 2.0
    found = kernels.log_probs_(logits, torch.tensor([4999]), IGNORED, slope=True)
    assert found.tolist() == [0.0] and not logits.any()
