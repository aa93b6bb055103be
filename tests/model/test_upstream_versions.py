"""Patches bind to one model and refuse a transformers that they do not fit, naming both versions."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import NemotronHForCausalLM
from transformers.models.nemotron_h import modeling_nemotron_h as upstream

from nemo_ray.errors import PatchError
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.patches import patch_model
from tests.model.shapes import CPU, tiny_config, tiny_model

CLASSES = [
    "NemotronHMamba2Mixer",
    "NemotronHAttention",
    "NemotronHMoE",
    "NemotronHExperts",
    "NemotronHBlock",
]
# What the packed forward reads of an upstream module.
READ = {
    "NemotronHMamba2Mixer": (
        ["in_proj", "conv1d", "norm", "out_proj", "dt_bias", "A_log", "D"]
        + ["chunk_size", "activation", "head_dim", "n_groups"]
    ),
    "NemotronHAttention": ["q_proj", "k_proj", "v_proj", "o_proj", "scaling", "head_dim"],
    "NemotronHMoE": ["experts", "gate", "shared_experts", "fc1_latent_proj", "fc2_latent_proj"],
    "NemotronHExperts": ["up_proj", "down_proj"],
    "NemotronHBlock": ["norm", "mixer", "block_type"],
}


def plain_model() -> NemotronHForCausalLM:
    torch.manual_seed(0)
    return NemotronHForCausalLM(tiny_config(pattern="ME*-")).eval()


def patch(model: NemotronHForCausalLM) -> None:
    patch_model(model, CPU, torch.float32)


def refused(*words: str):
    """A PatchError that names `words`, the installed version and those that the patches know."""
    anywhere = "".join(f"(?=.*{re.escape(word)})" for word in (*words, transformers.__version__))
    return pytest.raises(PatchError, match=rf"^{anywhere}.*5\.16 to 5\.\d+[^\n]*$")


def module_of(model: nn.Module, class_name: str) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == class_name)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_forward_with_another_first_parameter_is_refused(class_name, monkeypatch):
    def forward(self, inputs, **kwargs):
        raise AssertionError("never called")

    model = plain_model()
    monkeypatch.setattr(getattr(upstream, class_name), "forward", forward)
    with refused(class_name, "hidden_states"):
        patch(model)


@pytest.mark.parametrize(
    ("missing", "forward"),
    [
        ("top_k_index", lambda self, hidden_states, top_k_weights: None),
        ("top_k_weights", lambda self, hidden_states, top_k_index: None),
    ],
    ids=["index", "weights"],
)
def test_experts_that_are_called_otherwise_are_refused(missing, forward, monkeypatch):
    model = plain_model()
    monkeypatch.setattr(upstream.NemotronHExperts, "forward", forward)
    with refused("NemotronHExperts", missing):
        patch(model)


@pytest.mark.parametrize(("class_name", "attribute"), [(name, a) for name in READ for a in READ[name]])
def test_a_missing_child_or_attribute_is_refused(class_name, attribute):
    model = plain_model()
    delattr(module_of(model, class_name), attribute)
    with refused(class_name, attribute):
        patch(model)


@pytest.mark.parametrize("class_name", [*CLASSES, "NemotronHMLP"])
def test_a_renamed_class_is_refused(class_name, monkeypatch):
    model = plain_model()
    monkeypatch.delattr(upstream, class_name)
    with refused(class_name):
        patch(model)


@pytest.mark.parametrize("index", range(4), ids=["mamba", "moe", "attention", "mlp"])
def test_a_mixer_of_an_unknown_class_is_refused(index):
    """It would run as upstream has it, blind to document edges."""

    class NewMixer(nn.Module):
        pass

    model = plain_model()
    model.model.layers[index].mixer = NewMixer()
    with refused("NewMixer"):
        patch(model)


def test_only_the_patched_model_changes():
    before = {name: dict(vars(getattr(upstream, name))) for name in (*CLASSES, "NemotronHForCausalLM")}
    patched, untouched = plain_model(), plain_model()
    patch(patched)
    assert {name: dict(vars(getattr(upstream, name))) for name in before} == before
    assert not any("forward" in vars(module) for module in untouched.modules())
    assert type(module_of(untouched, "NemotronHMoE").experts) is upstream.NemotronHExperts


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_calls_go_on_as_upstream_has_them(mode, use_cache):
    config = tiny_config(
        time_step_limit=(1e-6, float("inf"))
    )  # upstream's own limit: no difference is wanted
    plain, patched = NemotronHForCausalLM(config), NemotronHForCausalLM(config)
    patched.load_state_dict(plain.state_dict())
    patch(patched)
    ids = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    outputs = []
    for model in (plain, patched):
        model.train(mode == "train")
        out = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=use_cache)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        outputs.append((out.logits, grads, out))
    (logits, grads, plain_out), (our_logits, our_grads, our_out) = outputs
    assert (our_logits - logits).abs().max() < 1e-5 * logits.std()
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            our_grads[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1e-6), msg=name
        )
    if use_cache:
        next_ids = ids[:, :1]
        step, our_step = (
            model(input_ids=next_ids, past_key_values=out.past_key_values).logits
            for model, out in ((plain, plain_out), (patched, our_out))
        )
        assert (our_step - step).abs().max() < 1e-5 * step.std()


def test_a_copy_runs_on_its_own_weights():
    """A forward that is bound to the first model would go on reading that one's."""
    model = tiny_model().eval()
    ids = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths(ids, [[20]])
    with torch.no_grad():
        packed, plain = model.packed_logits(batch), model(input_ids=ids, use_cache=False).logits
        twin = copy.deepcopy(model)
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        assert torch.equal(twin.packed_logits(batch), packed)
        assert torch.equal(twin(input_ids=ids, use_cache=False).logits, plain)
