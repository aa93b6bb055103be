"""What a worker does once before its first step."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection, TrainSection
from nemo_ray.model.load import Precision, build
from nemo_ray.train import update
from nemo_ray.train.activations import Kept
from nemo_ray.train.optim import make_optimizer
from nemo_ray.train.parallelize import Layout, parallelize
from nemo_ray.train.update import Trainee, Update, compile_kernels, recordable
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config
from tests.train.test_graph import trained


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (ALL_TARGETS, True),
        (ALL_TARGETS | {"lora_dropout": 0.1}, False),
        (ALL_TARGETS | {"lora_modules_to_save": ("embeddings",)}, False),
        ({}, False),
    ],
    ids=["lora", "dropout", "whole modules", "full"],
)
def test_what_is_recorded(adapter: dict, expected: bool) -> None:
    model, _ = build(tiny_config(), AdapterSection(**adapter), Precision(), CPU)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parallel = parallelize(model, Layout(1, 1), CPU, recompute=False)
    assert recordable(Trainee(model, parameters, None, parallel, CPU)) is expected


def test_kernels_are_compiled_at_the_size_that_trains():
    model, parameters = trained()
    parallel = parallelize(model, Layout(1, 1), CPU, recompute=False)
    optimizer = make_optimizer(parameters, TrainSection(), rank=0, world_size=1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    seen, original = [], model.target_log_probs

    def target_log_probs(batch, targets):
        seen.append((tuple(batch.input_ids.shape), torch.is_grad_enabled(), model.training))
        return original(batch, targets)

    model.target_log_probs = target_log_probs
    compile_kernels(Trainee(model.eval(), parameters, optimizer, parallel, CPU), 2, 96)
    assert seen == [((2, 96), True, True)]
    assert all(p.grad is None for p in parameters.values())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("sharded", [False, True])
def test_activations_are_moved_but_not_of_what_fsdp2_shards(sharded: bool, monkeypatch) -> None:
    model, parameters = trained()
    parallel = parallelize(model, Layout(1, 1), CPU, recompute=False)
    parallel.sharded = sharded
    optimizer = make_optimizer(parameters, TrainSection(), rank=0, world_size=1)
    given = []

    def keep_what_fits(model, device, forward, moving, untracked_bytes):
        given.append(moving)
        torch.rand(len(given))  # as dropout does
        forward().backward()
        return Kept({}, {"moe": 1})

    monkeypatch.setattr(update, "keep_what_fits", keep_what_fits)
    trainee = Trainee(model, parameters, optimizer, parallel, CPU)
    before = torch.get_rng_state()
    assert Update(trainee, TrainSection()).keep_activations(96).on_host == {"moe": 1}
    assert torch.equal(torch.get_rng_state(), before)
    assert [moving is None for moving in given] == [sharded]
    assert not any(p.grad is not None and p.grad.any() for p in parameters.values())
