"""Recorded passes add up what plain ones do. Recording needs a GPU; the recorder here repeats the call."""

import numpy as np
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.data.packing import build_pack
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.train.graph import GraphedPasses, Sizes
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.micro_batch import MicroBatch
from tests.model.shapes import ALL_TARGETS, CPU, randomize_lora, tiny_config

LAYOUTS = [[64], [1, 1, 30, 32], [20, 44], [10, 20, 30, 4], [3] * 20 + [4], [63, 1]]


def micro_batch(lengths: list[int], seed: int) -> MicroBatch:
    ids = np.random.default_rng(seed).integers(0, 128, sum(lengths), dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int64)
    mask = np.ones(len(ids), np.uint8)
    pack = build_pack(ids, mask, np.array(lengths, np.int32), rows, 0, len(ids), pad_id=0)
    return MicroBatch.collate([pack], CPU)


def trained():
    model, _ = build(tiny_config(), AdapterSection(**ALL_TARGETS), Precision(), CPU)
    bind_loss(model)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    randomize_lora(model)
    return model.train(), {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_and_losses_are_those_of_plain_passes():
    model, parameters = trained()
    recorded = []

    def record(run):
        if not recorded:
            run()  # warms up
        recorded.append(run)
        return run

    passes = GraphedPasses(model, parameters, CPU, record)
    addresses = [p.grad.data_ptr() for p in parameters.values()]
    for step in range(2):
        batches = [micro_batch(lengths, 10 * step + i) for i, lengths in enumerate(LAYOUTS)]
        for micro in batches:
            passes(micro, 0.5)
        found = {name: p.grad.clone() for name, p in parameters.items()}
        loss_sum = passes.take_loss_sum()
        passes.zero_gradients()
        assert not any(p.grad.any() for p in parameters.values())

        expected = torch.zeros(())
        for micro in batches:
            loss = -model.target_log_probs(micro.batch, micro.targets).sum()
            (0.5 * loss).backward()
            expected += loss.detach()
        torch.testing.assert_close(loss_sum, expected)
        for name, parameter in parameters.items():
            assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
        passes.zero_gradients()
    assert [p.grad.data_ptr() for p in parameters.values()] == addresses
    sizes = {Sizes.of(micro_batch(lengths, 0).batch) for lengths in LAYOUTS}
    assert len(recorded) == len(sizes) < len(LAYOUTS)


def test_what_is_not_finite_is_gone_with_the_step():
    model, parameters = trained()
    passes = GraphedPasses(model, parameters, CPU, lambda run: run)
    micro = micro_batch([20, 44], 0)
    embeddings = model.get_input_embeddings().weight.detach()
    sound, found = embeddings.clone(), []
    for scale in (1.0, torch.inf, 1.0):
        embeddings.copy_(sound * scale)
        passes(micro, 0.5)
        found.append((passes.take_loss_sum(), [p.grad.clone() for p in parameters.values()]))
        passes.zero_gradients()
    (loss, gradients), (bad_loss, bad_gradients), (later_loss, later_gradients) = found
    assert not bad_loss.isfinite() and not any(gradient.isfinite().all() for gradient in bad_gradients)
    assert torch.equal(loss, later_loss) and all(map(torch.equal, gradients, later_gradients))


def test_sizes_are_rounded_up_but_to_a_pack_at_most():
    assert Sizes.of(micro_batch([20, 44], 0).batch) == Sizes(2, 64)
    assert Sizes.of(micro_batch([3] * 20 + [4], 0).batch) == Sizes(32, 4)
    assert Sizes.of(micro_batch([80], 0).batch) == Sizes(1, 80)
