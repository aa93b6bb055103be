"""With mamba-ssm and causal-conv1d: packed equals separate, and the kernels equal the torch reference."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.selftest import self_test
from nemo_ray.model.ssd import reference_scan, select_split_conv1d_scan
from tests.model.shapes import ALL_TARGETS, randomize_lora, tiny_config
from tests.model.test_remake import kept_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
SHAPE = {"mamba_head_dim": 32, "ssm_state_size": 32, "chunk_size": 64, "hidden_size": 128}
LAYOUTS = [[128, 128], [1, 1, 100, 153, 1], [256], [60, 70, 126], [5, 251]]


def gpu_model(dtype: torch.dtype, latent: int | None = None):
    adapter = AdapterSection(**ALL_TARGETS)
    model, targets = build(tiny_config(latent=latent, **SHAPE), adapter, Precision(dtype, dtype), GPU)
    fill(model, None, seed=3, device=GPU, adapter_seed=3)
    randomize_lora(model)
    return model, targets


def run(model, packs):
    model.zero_grad(set_to_none=True)
    logits = torch.cat([model.packed_logits(PackedBatch.from_lengths(ids[None], [n]))[0] for ids, n in packs])
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(GPU)
    (logits.log_softmax(-1) * weights).sum().backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().float(), grads


def test_the_kernels_are_the_ones_that_run():
    assert select_split_conv1d_scan(GPU) is not reference_scan


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("latent", [None, 64], ids=["plain", "latent"])
def test_packed_equals_separate_in_float32(latent, mode):
    model, _ = gpu_model(torch.float32, latent)
    model.train(mode == "train")
    ids = torch.randint(0, 128, (256,), generator=torch.Generator().manual_seed(1)).to(GPU)
    for lengths in LAYOUTS:
        packed, packed_grads = run(model, [(ids, lengths)])
        alone, alone_grads = run(model, [(part, [len(part)]) for part in ids.split(lengths)])
        off = float((packed - alone).abs().max() / alone.std())
        grads_off = {n: float((g - alone_grads[n]).norm() / g.norm()) for n, g in packed_grads.items()}
        worst = max(grads_off, key=grads_off.__getitem__)
        print(f"{mode} latent={latent} {lengths}: logits {off:.1e}, {worst} {grads_off[worst]:.1e}")
        assert off < 1e-5 and grads_off[worst] < 1e-5


@pytest.mark.usefixtures("exact_float32")
def test_packed_bf16_is_as_near_to_float32_as_separate_bf16():
    exact, _ = gpu_model(torch.float32)
    model, _ = gpu_model(torch.bfloat16)
    model.load_state_dict({k: v.to(dict(model.state_dict())[k].dtype) for k, v in exact.state_dict().items()})
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ids = torch.randint(0, 128, (256,), generator=torch.Generator().manual_seed(1)).to(GPU)
    for lengths in LAYOUTS:
        parts = [(part, [len(part)]) for part in ids.split(lengths)]
        truth, _ = run(exact, parts)
        packed, _ = run(model, [(ids, lengths)])
        alone, _ = run(model, parts)
        assert (packed - truth).norm() < 1.2 * (alone - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.usefixtures("exact_float32")
def test_kernels_equal_the_reference_with_gradients():
    torch.manual_seed(0)
    heads, head_dim, groups, state, width, tokens = 8, 32, 2, 32, 4, 200
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    seq_idx = torch.zeros(2, tokens, dtype=torch.int32, device=GPU)
    seq_idx[0, 70:] += 1
    seq_idx[1, 5:] += 1
    seq_idx[1, 131:] += 1
    results = []
    for scan in (select_split_conv1d_scan(GPU), reference_scan):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator).to(GPU).requires_grad_()

        args = {
            "zxbcdt": draw(2, tokens, inner + channels + heads),
            "conv1d_weight": draw(channels, width),
            "conv1d_bias": draw(channels),
            "dt_bias": draw(heads),
            "A": draw(heads),
            "D": draw(heads),
            "rmsnorm_weight": draw(inner),
        }
        out, again = scan(
            **(args | {"A": -args["A"].exp()}), chunk_size=64, seq_idx=seq_idx, dt_limit=(0.0, float("inf")),
            activation="silu", rmsnorm_eps=1e-5, headdim=head_dim, ngroups=groups, norm_before_gate=False,
        )  # fmt: skip
        if again is not None:
            assert torch.equal(again.make(*again.sources), out)
        out.sin().sum().backward()
        results.append([out, *(value.grad for value in args.values())])
    for kernel, reference in zip(*results, strict=True):
        assert (kernel - reference).norm() < 1e-3 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_passes(dtype):
    model, targets = gpu_model(dtype)
    self_test(model, targets, GPU, dtype)


def test_kernels_keep_enough_to_make_layers_inputs_again():
    model, _ = gpu_model(torch.bfloat16)
    kept = kept_inputs(model.train(), GPU, torch.bfloat16)
    assert kept["linear_attention"] == set() and kept["moe"] == set()
