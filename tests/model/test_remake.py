"""What blocks keep for the backward pass where layers' inputs are made again, and that they get the same."""

import pytest
import torch

from nemo_ray.model import patches
from nemo_ray.model.batch import PackedBatch
from tests.model.shapes import ALL_TARGETS, tiny_config, tiny_model

LAYERS = {
    "linear_attention": ("in_proj", "out_proj"),
    "full_attention": ("q_proj", "k_proj", "v_proj"),
    "moe": ("experts", "shared_experts"),
    "mlp": ("up_proj",),
}


def kept_inputs(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, set[str]]:
    """Kind of block -> its adapted layers whose inputs are kept in memory by a forward pass."""
    kept: dict[str, set[str]] = {}
    ids = torch.arange(32, device=device)[None]
    batch = PackedBatch.from_lengths(ids, [[20, 12]])
    for block in model.model.layers:
        inputs: dict[str, torch.Tensor] = {}
        for name in LAYERS.get(block.block_type, ()):
            layer = getattr(block.mixer, name)
            layer.register_forward_pre_hook(
                lambda _, args, name=name, into=inputs: into.update({name: args[0]})
            )
        saved: list[torch.Tensor] = []  # held, so that no address is given twice
        hidden = torch.randn(1, 32, model.config.hidden_size, device=device).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            block(hidden, packed=batch)
        assert inputs.keys() == set(LAYERS.get(block.block_type, ())), "each of them was called"
        addresses = {tensor.untyped_storage().data_ptr() for tensor in saved}
        found = {name for name, x in inputs.items() if x.untyped_storage().data_ptr() in addresses}
        kept[block.block_type] = kept.get(block.block_type, set()) | found
    return kept


def test_blocks_keep_no_input_that_is_made_again():
    model = tiny_model(adapter=ALL_TARGETS).train()
    kept = kept_inputs(model, torch.device("cpu"), torch.float32)
    assert kept["linear_attention"] == {"out_proj"}  # the reference keeps too little to make it again
    assert kept["moe"] == kept["mlp"] == set()
    assert kept["full_attention"] == {"q_proj", "k_proj", "v_proj"}  # one tensor


def test_a_whole_model_that_trains_keeps_them():
    kept = kept_inputs(tiny_model().train(), torch.device("cpu"), torch.float32)
    assert kept["linear_attention"] == {"in_proj", "out_proj"}
    assert kept["moe"] == {"experts", "shared_experts"} and kept["mlp"] == {"up_proj"}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("latent", [None, 32], ids=["plain", "latent"])
def test_gradients_are_those_of_inputs_that_are_kept(latent, recompute, monkeypatch):
    ids = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(1))
    found = []
    for again in (patches.norm_again, lambda *_: None):
        monkeypatch.setattr(patches, "norm_again", again)
        model = tiny_model(tiny_config(latent=latent), adapter=ALL_TARGETS).train()
        for block in model.model.layers:
            block.recompute = recompute
        model.packed_logits(PackedBatch.from_lengths(ids, [[20, 28]])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
