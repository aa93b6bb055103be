"""Packed documents give the values and gradients of the documents run alone, with every block kind."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import NemotronHForCausalLM

from nemo_ray.model import experts
from nemo_ray.model.activation import relu_squared
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.lora import lora_parameters
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config, tiny_model

LAYOUTS = [[20, 44], [1, 1, 30, 31, 1], [64], [16, 16, 32], [5, 59]]
SHAPES = {"all kinds": tiny_config(), "latent experts": tiny_config(latent=32)}


def logits_and_gradients(model, packs: list[tuple[torch.Tensor, list[int]]]):
    """Concatenated logits, and gradients of one loss over all tokens."""
    model.zero_grad(set_to_none=True)
    parts = [model.packed_logits(PackedBatch.from_lengths(ids[None], [lengths]))[0] for ids, lengths in packs]
    logits = torch.cat(parts)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.log_softmax(-1) * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", [ALL_TARGETS, None], ids=["lora", "full"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_packed_equals_separate(config, adapter, checkpointing, mode):
    model = tiny_model(config, adapter).train(mode == "train")
    for block in model.model.layers:
        block.recompute = checkpointing
    ids = torch.randint(0, config.vocab_size, (64,), generator=torch.Generator().manual_seed(1))
    for lengths in LAYOUTS:
        packed, packed_grads = logits_and_gradients(model, [(ids, lengths)])
        alone, alone_grads = logits_and_gradients(model, [(part, [len(part)]) for part in ids.split(lengths)])
        scale = alone.std()
        assert (packed - alone).abs().max() < 1e-5 * scale
        assert packed_grads.keys() == alone_grads.keys() and len(packed_grads) > 20
        for name, grad in packed_grads.items():
            torch.testing.assert_close(
                grad, alone_grads[name], rtol=1e-3, atol=2e-4 * float(grad.abs().max() + 1e-6)
            )


def test_a_leak_would_be_seen():
    """The comparison is not vacuous: the same tokens as one document give other logits."""
    model = tiny_model().eval()
    ids = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(1))
    packed = model.packed_logits(PackedBatch.from_lengths(ids, [[20, 44]]))
    merged = model.packed_logits(PackedBatch.from_lengths(ids, [[64]]))
    assert (packed - merged)[0, 20:].abs().max() > 0.05 * packed.std()
    torch.testing.assert_close(packed[0, :20], merged[0, :20])


@pytest.mark.parametrize("latent", [None, 32])
def test_one_document_equals_plain_transformers(latent, tmp_path):
    config = tiny_config(latent=latent)
    ours = tiny_model(config).eval()
    plain = NemotronHForCausalLM(config).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(1))
    packed = ours.packed_logits(PackedBatch.from_lengths(ids, [[50], [50]]))
    expected = plain(input_ids=ids, use_cache=False).logits
    assert (packed - expected).abs().max() < 1e-5 * expected.std()


def test_the_step_limit_of_the_config_is_used():
    config = tiny_config(time_step_limit=(0.5, 0.6))
    adapter_free = {"adapter": None}
    limited = tiny_model(config, adapter_free)
    assert limited.model.layers[0].mixer.time_step_limit == (0.5, 0.6)
    ids = torch.randint(0, 128, (1, 30), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths(ids, [[30]])
    free = tiny_model(tiny_config(), adapter_free)
    assert (limited.packed_logits(batch) - free.packed_logits(batch)).abs().max() > 1e-3


def test_every_lora_factor_gets_a_gradient():
    model = tiny_model(tiny_config(latent=32), ALL_TARGETS)
    ids = torch.randint(0, 128, (64,), generator=torch.Generator().manual_seed(1))
    _, grads = logits_and_gradients(model, [(ids, [30, 34])])
    assert grads.keys() == lora_parameters(model).keys()
    # q,k,v,o; in, out twice; shared up, down and latent twice; the MLP's two; two banks of two
    assert len(grads) == 2 * (4 + 4 + 8 + 2 + 4)
    assert all(grad.norm() > 0 for grad in grads.values())


def test_parameters_of_lora_models_are_float32_and_the_base_is_frozen():
    model, _ = build(tiny_config(), tiny_section(), Precision(torch.bfloat16, torch.bfloat16), CPU)
    fill(model, None, seed=0, device=CPU, adapter_seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        kept = "lora_" in name or name.endswith(("A_log", ".D", "dt_bias", ".gate.weight"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name


def tiny_section():
    from nemo_ray.config.schema import AdapterSection

    return AdapterSection(**ALL_TARGETS)


class _CountedProducts(TorchDispatchMode):
    """Products by the shape (inputs, outputs) of their matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten._grouped_mm.default, torch.ops.aten.mm.default):
            self.counts[tuple(args[1].shape[-2:])] += 1
        elif op == torch.ops.aten.addmm_.default:
            self.counts[tuple(args[2].shape)] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", [("q_proj",), None], ids=["frozen layers", "lora on all"])
def test_recomputation_takes_no_last_product_again(targets):
    """What a block computes last needs nothing kept: neither Mamba's nor attention's nor the experts' is."""
    config = tiny_config(mamba_head_dim=10, head_dim=26, moe_intermediate_size=28)  # no two shapes alike
    model = tiny_model(
        config, {"adapter": "lora", "lora_target_modules": targets} if targets else ALL_TARGETS
    )
    model.train().model.embeddings.weight.requires_grad_(True)  # so that a gradient passes every block
    ids = torch.randint(0, config.vocab_size, (1, 32))
    counts = []
    for recompute in (True, False):
        for block in model.model.layers:
            block.recompute = recompute
        with _CountedProducts() as products:
            model.packed_logits(PackedBatch.from_lengths(ids, [[32]])).sum().backward()
        counts.append(products.counts)
    again = counts[0] - counts[1]
    kinds = Counter(block.block_type for block in model.model.layers)
    for kind, first, last in (
        ("linear_attention", (64, 232), (80, 64)),
        ("full_attention", (64, 104), (104, 64)),
        ("moe", (64, 28), (28, 64)),
        ("mlp", (64, 96), (96, 64)),
    ):
        assert again[first] == kinds[kind] and again[last] == 0, (kind, again)


def test_recomputation_does_not_square_what_only_the_last_product_needs(monkeypatch):
    """Experts without factors: the down projection's input is wanted once, for the product itself."""
    squared = []
    monkeypatch.setattr(experts, "relu_squared", lambda x: squared.append(x.shape) or relu_squared(x))
    model = tiny_model(adapter={"adapter": "lora", "lora_target_modules": ("q_proj", "in_proj")}).train()
    for block in model.model.layers:
        block.recompute = True
    batch = PackedBatch.from_lengths(torch.zeros((1, 32), dtype=torch.int64), [[32]])
    model.packed_logits(batch).sum().backward()
    assert len(squared) == sum(block.block_type == "moe" for block in model.model.layers)
