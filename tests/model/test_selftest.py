"""The self-test passes a sound model, leaves it as it was, and refuses one broken in each way."""

import types

import pytest
import torch

from nemo_ray.errors import PatchError
from nemo_ray.model import patches
from nemo_ray.model.experts import RoutedExperts
from nemo_ray.model.lora import LoraLinear, LoraTargets
from nemo_ray.model.selftest import self_test
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config, tiny_model


def check(model, targets=None) -> None:
    self_test(model, targets, CPU, torch.float32)


def all_targets(model) -> LoraTargets:
    modules = tuple(name for name, m in model.named_modules() if isinstance(m, LoraLinear))
    banks = [
        name for name, m in model.named_modules() if isinstance(m, RoutedExperts) and any(m.scalings.values())
    ]
    return LoraTargets(modules, tuple(f"{name}.{side}_proj" for name in banks for side in ("up", "down")))


@pytest.mark.parametrize("latent", [None, 32])
@pytest.mark.parametrize("adapter", [ALL_TARGETS | {"lora_dropout": 0.0}, None], ids=["lora", "full"])
def test_a_sound_model_passes_and_is_left_as_it_was(latent, adapter):
    model = tiny_model(tiny_config(latent=latent), adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, all_targets(model) if adapter else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_dropout_does_not_fail_it():
    adapter = {key: value for key, value in ALL_TARGETS.items() if key != "lora_target_parameters"}
    model = tiny_model(adapter=adapter | {"lora_dropout": 0.5})
    check(model, all_targets(model))
    assert {m.dropout for m in model.modules() if isinstance(m, LoraLinear)} == {0.5}


def unpatch(model, index: int) -> None:
    """The block's mixer as transformers has it: blind to document edges."""
    mixer = model.model.layers[index].mixer
    upstream_forward = type(mixer).forward

    def forward(self, hidden_states, packed=None, **kwargs):
        kwargs["attention_mask"] = None
        return upstream_forward(self, hidden_states=hidden_states, **kwargs)

    mixer.forward = types.MethodType(forward, mixer)


@pytest.mark.parametrize("index", [0, 2], ids=["mamba", "attention"])
def test_a_leak_is_refused(index):
    model = tiny_model()
    unpatch(model, index)
    with pytest.raises(PatchError, match="packed documents see each other in train mode"):
        check(model)


def test_a_leak_inside_a_chunk_alone_is_refused(monkeypatch):
    """A scan that resets its state between chunks only: edges on chunks would not show it."""
    real = patches.select_split_conv1d_scan(CPU)

    def scan(*args, seq_idx, chunk_size, **kwargs):
        chunks = torch.arange(seq_idx.shape[1]) // chunk_size
        starts = torch.where(seq_idx[:, ::chunk_size] != 0, 1, 0).to(torch.int32)
        return real(*args, seq_idx=starts[:, chunks], chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(patches, "select_split_conv1d_scan", lambda device: scan)
    with pytest.raises(PatchError, match=r"in block 0 \(linear_attention\)"):
        check(tiny_model())


def test_modes_that_disagree_are_refused():
    model = tiny_model()
    mixer = model.model.layers[3].mixer
    inner = mixer.forward
    mixer.forward = lambda x, again=None: inner(x) * (1.5 if model.training else 1.0)
    with pytest.raises(PatchError, match="train and eval mode disagree"):
        check(model)


def test_an_adapter_without_gradient_is_refused():
    model = tiny_model(adapter=ALL_TARGETS)
    layer = model.model.layers[0].mixer.out_proj
    layer.forward = lambda x, again=None: torch.nn.functional.linear(x, layer.weight)
    with pytest.raises(PatchError, match=r"layers\.0\.mixer\.out_proj\.lora_A gets no gradient"):
        check(model, all_targets(model))


def test_a_missing_expert_adapter_is_refused():
    model = tiny_model(adapter=ALL_TARGETS)
    targets = all_targets(model)
    model.model.layers[1].mixer.experts.up_lora_A = None
    with pytest.raises(PatchError, match="3 expert adapters are in place, 4 were asked for"):
        check(model, targets)


def test_other_transformers_are_refused(monkeypatch):
    monkeypatch.setitem(patches.EXPECTED_FORWARD, "NemotronHBlock", ("hidden_states", "new_argument"))
    with pytest.raises(PatchError, match=r"transformers .*NemotronHBlock\.forward lacks new_argument"):
        tiny_model()
    monkeypatch.undo()
    monkeypatch.setitem(patches.EXPECTED_CHILDREN, "NemotronHMamba2Mixer", ("in_proj", "another"))
    with pytest.raises(PatchError, match="NemotronHMamba2Mixer has no another"):
        tiny_model()


def test_another_activation_is_refused():
    with pytest.raises(PatchError, match="mlp_hidden_act is 'silu'"):
        tiny_model(tiny_config(mlp_hidden_act="silu"))
