"""Activations in host memory on a GPU: the same gradients, recorded or not, and less memory held."""

import gc
from collections.abc import Iterator

import pytest
import torch

from nemo_ray.train import offload
from nemo_ray.train.graph import CudaRecorder, GraphedPasses
from nemo_ray.train.offload import HostActivations, pinned
from tests.gpu.test_step_gpu import GPU, LAYOUTS, gradients, micro_batch, on_gpu, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Registered memory goes with the model that it served, not while a later test records."""
    yield
    gc.collect()


def moving(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> HostActivations:
    """The first half of the blocks move theirs; the others keep them."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 2**10)
    for block in model.model.layers:
        block.recompute = False
    found = HostActivations(model, GPU)
    found.move(range(len(model.model.layers) // 2))
    return found


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name


def test_gradients_are_the_same(monkeypatch):
    model, parameters = trained(torch.bfloat16)
    micro = micro_batch(LAYOUTS[0], 0)
    _, wanted = gradients(model, parameters, micro)
    found = moving(model, monkeypatch)
    for _ in range(3):
        assert_close(gradients(model, parameters, micro)[1], wanted)
    assert found.host_bytes > 0 and not found._leaving


def test_a_step_that_moves_them_is_recorded(monkeypatch):
    model, parameters = trained(torch.bfloat16)
    wanted = [gradients(model, parameters, micro_batch(LAYOUTS[0], seed))[1] for seed in (0, 1)]
    moving(model, monkeypatch)
    passes = GraphedPasses(model, parameters, GPU, CudaRecorder())
    for seed in (0, 1, 0):
        passes.zero_gradients()
        passes(micro_batch(LAYOUTS[0], seed), 1.0)
        torch.cuda.synchronize()
        found = {name: p.grad.clone() for name, p in parameters.items()}
        assert_close(found, {name: -grad for name, grad in wanted[seed].items()})  # of a loss


def test_pinned_memory_is_copied_without_the_host():
    host, ones = pinned(2**26 + 3, GPU), torch.ones(2**26 + 3, dtype=torch.uint8, device=GPU)
    assert host.is_pinned() and host.numel() == 2**26 + 3
    torch.cuda.synchronize()
    host.copy_(ones, non_blocking=True)
    torch.cuda.synchronize()
    assert int(host.min()) == 1


def test_less_is_held_between_the_passes(monkeypatch):
    monkeypatch.setattr(offload, "BEHIND", 1)
    model, _ = trained(torch.bfloat16)
    found, micro = moving(model, monkeypatch), on_gpu(micro_batch(LAYOUTS[0], 0))

    def held() -> int:
        before = torch.cuda.memory_allocated()
        loss = model.target_log_probs(micro.batch, micro.targets).sum()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return held

    held()
    moved = held()
    found.move([])
    assert moved < held()


def test_neighbours_that_are_made_again_and_blocks_that_save_nothing(monkeypatch):
    model, parameters = trained(torch.bfloat16)
    wanted = gradients(model, parameters, micro_batch(LAYOUTS[0], 0))[1]
    found = moving(model, monkeypatch)
    found.move(range(0, len(model.model.layers), 2))
    for index, block in enumerate(model.model.layers):
        block.recompute = index % 2 == 1

    for least in (2**40, 2**10):  # the first pass sends nothing
        monkeypatch.setattr(offload, "LEAST_BYTES", least)
        passes = GraphedPasses(model, parameters, GPU, CudaRecorder())
        passes.zero_gradients()
        passes(micro_batch(LAYOUTS[0], 0), 1.0)
        torch.cuda.synchronize()
        assert_close({name: -p.grad for name, p in parameters.items()}, wanted)
