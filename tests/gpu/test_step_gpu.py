"""A step on a GPU: recorded passes, kept activations and kernels change nothing but the time it takes."""

import pytest
import torch
import torch.distributed as dist

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model import kernels
from nemo_ray.model.balance import max_violation
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.routing import router_logits
from nemo_ray.train import activations
from nemo_ray.train.graph import CudaRecorder, GraphedPasses
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.micro_batch import MicroBatch
from tests.model.shapes import ALL_TARGETS, randomize_lora, tiny_config
from tests.train.test_graph import LAYOUTS, micro_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
SHAPE = {"mamba_head_dim": 32, "ssm_state_size": 32, "chunk_size": 64, "hidden_size": 128}
FOUR_BITS = {"linears_4bit": True, "experts_4bit": True}


def trained(
    dtype: torch.dtype,
    latent: int | None = None,
    seed: int = 3,
    every_expert: bool = False,
    **precision: bool,
):
    config = tiny_config(latent=latent, **SHAPE)
    if every_expert:
        config.num_experts_per_tok = config.n_routed_experts
    model, _ = build(config, AdapterSection(**ALL_TARGETS), Precision(dtype, dtype, **precision), GPU)
    bind_loss(model)
    fill(model, None, seed=seed, device=GPU, adapter_seed=seed)
    randomize_lora(model)
    return model.train(), {name: p for name, p in model.named_parameters() if p.requires_grad}


def on_gpu(micro: MicroBatch) -> MicroBatch:
    batch = micro.batch
    moved = type(batch)(
        batch.input_ids.to(GPU), batch.seq_idx.to(GPU), batch.cu_seqlens.to(GPU), batch.max_seqlen
    )
    return MicroBatch(moved, micro.targets.to(GPU))


def gradients(model, parameters, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    micro = on_gpu(micro)
    log_probs = model.target_log_probs(micro.batch, micro.targets)
    log_probs.sum().backward()
    return log_probs.detach(), {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(("experts", "hidden"), [(128, 2688), (512, 4096)], ids=["nano", "super"])
def test_router_logits_are_those_of_float32(experts, hidden):
    generator = torch.Generator(GPU).manual_seed(0)
    tokens = torch.randn(2048, hidden, device=GPU, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(experts, hidden, device=GPU, generator=generator) / hidden**0.5
    grad = torch.randn(2048, experts, device=GPU, generator=generator)
    logits, exact = router_logits(tokens, weight), tokens.detach().double() @ weight.double().T
    logits.backward(grad)
    exact_grad = grad.double() @ weight.double()
    print(f"logits off by {(logits - exact).norm() / exact.norm():.1e}")
    assert (logits - exact).norm() <= 2e-5 * exact.norm()  # how tensor cores sum; bf16 rounds tokens by 2e-3
    assert (tokens.grad - exact_grad).norm() <= 1.01 * (exact_grad.bfloat16() - exact_grad).norm()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", [{}, FOUR_BITS], ids=["bf16", "4 bits"])
def test_recorded_passes_add_up_what_plain_ones_do(precision, recompute):
    model, parameters = trained(torch.bfloat16, latent=64, **precision)
    for block in model.model.layers:
        block.recompute = recompute
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    total = torch.zeros((), device=GPU)
    batches = [micro_batch(lengths, seed) for seed, lengths in enumerate(LAYOUTS)]
    for micro in batches:
        log_probs, grads = gradients(model, parameters, micro)
        total -= log_probs.sum()
        for name, grad in grads.items():
            expected[name] -= 0.5 * grad
    violation = max_violation(model)
    passes = GraphedPasses(model, parameters, GPU, CudaRecorder())
    for turn in range(3):
        for micro in batches:
            passes(micro, 0.5)
        if turn:  # the first one records, which runs a batch more
            assert torch.isclose(max_violation(model), violation)
        else:
            max_violation(model)
        torch.testing.assert_close(passes.take_loss_sum(), total, rtol=1e-3, atol=0)
        for name, parameter in parameters.items():
            assert (parameter.grad - expected[name]).norm() <= 1e-2 * expected[name].norm(), name
        passes.zero_gradients()


def test_what_runs_between_steps_takes_the_memory_of_graphs():
    model, parameters = trained(torch.bfloat16)
    recorder, micro = CudaRecorder(), micro_batch(LAYOUTS[0], 0)
    passes, moved = GraphedPasses(model, parameters, GPU, recorder), on_gpu(micro)
    passes(micro, 0.5)
    recorded = {name: p.grad.clone() for name, p in parameters.items()}
    passes.zero_gradients()
    with torch.no_grad():
        expected = model.target_log_probs(moved.batch, moved.targets).sum()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        with recorder.lent():
            found = model.target_log_probs(moved.batch, moved.targets).sum().item()
    assert torch.cuda.memory_reserved() <= held
    assert found == pytest.approx(expected.item(), rel=1e-3)
    passes(micro, 0.5)
    for name, parameter in parameters.items():
        assert (parameter.grad - recorded[name]).norm() <= 1e-3 * recorded[name].norm(), name


def test_what_fits_is_kept_and_changes_no_gradient(monkeypatch):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, parameters = trained(torch.bfloat16)
    micro = micro_batch([20, 44], 1)

    def forward() -> torch.Tensor:
        moved = on_gpu(micro)
        return model.target_log_probs(moved.batch, moved.targets).sum()

    assert activations.keep_what_fits(model, GPU, forward).on_gpu == {
        kind: sum(block.block_type == kind for block in model.model.layers)
        for kind in {block.block_type for block in model.model.layers}
    }
    _, kept = gradients(model, parameters, micro)
    with monkeypatch.context() as patch:  # a share of the GPU that is used up already
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.001)
        assert not any(activations.keep_what_fits(model, GPU, forward).on_gpu.values())
    monkeypatch.setattr(activations, "SPARE_BYTES", 2**50)
    assert not any(activations.keep_what_fits(model, GPU, forward).on_gpu.values())
    _, recomputed = gradients(model, parameters, micro)
    for name, grad in kept.items():
        assert (grad - recomputed[name]).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("every_expert", [True, False], ids=["every expert", "the best"])
@pytest.mark.parametrize("latent", [None, 64], ids=["plain", "latent"])
def test_kernels_are_as_near_to_float32_as_their_references(latent, every_expert, monkeypatch):
    """In bf16 a choice of experts may turn over, with or without kernels, and moves a gradient ten times as
    far as rounding does: many models are needed to compare. Where every expert is chosen, none can."""
    errors = {True: [], False: []}
    for model_seed in range(3 if every_expert else 12):
        exact, exact_parameters = trained(torch.float32, latent, model_seed, every_expert)
        model, parameters = trained(torch.bfloat16, latent, model_seed, every_expert)
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.load_state_dict({k: v.to(dtypes[k]) for k, v in exact.state_dict().items()})
        exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        for seed, lengths in enumerate(LAYOUTS):
            micro = micro_batch(lengths, seed)
            monkeypatch.setattr(kernels, "serve", lambda tensor: False)
            truth, true_grads = gradients(exact, exact_parameters, micro)
            for serve in (True, False):
                monkeypatch.setattr(kernels, "serve", lambda tensor, serve=serve: serve)
                found, grads = gradients(model, parameters, micro)
                off = [float((found - truth).norm() / truth.norm())]
                off += [float((grads[n] - g).norm() / g.norm()) for n, g in true_grads.items()]
                errors[serve].append(torch.tensor(off))
            monkeypatch.setattr(kernels, "serve", lambda tensor: True)
            found, grads = gradients(exact, exact_parameters, micro)
            assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
            for name, grad in true_grads.items():
                assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name
    fast, plain = (torch.stack(errors[serve]).median(0).values for serve in (True, False))
    print(f"error of bf16 with kernels {fast.mean():.2e}, with references {plain.mean():.2e}")
    assert fast.mean() <= (1.05 if every_expert else 1.2) * plain.mean()
    if every_expert:
        assert (fast <= 1.2 * plain).all(), "each gradient by itself"
