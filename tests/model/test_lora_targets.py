"""Which names LoRA targets match, and what is said of those that match nothing."""

import pytest
import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.errors import ConfigError
from nemo_ray.model.load import Precision, build
from nemo_ray.targets import LINEAR_NAMES, expert_paths, find_targets, linear_paths, strength_of
from tests.model.shapes import CPU, tiny_config


def targets(latent: int | None = None, **adapter: object):
    return build(
        tiny_config(latent=latent), AdapterSection(adapter="lora", lora_r=4, **adapter), Precision(), CPU
    )[1]


def leaves(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_target_linear_is_every_linear_layer_but_router_head_and_embeddings():
    found = targets(latent=32, lora_target_linear=True)
    assert leaves(found.modules) == set(LINEAR_NAMES)
    assert len(found.modules) == 4 + 2 * 2 + 2 * 4 + 2
    assert found.parameters == ()


def test_a_bare_name_means_linear_layers_in_modules_and_experts_in_parameters():
    found = targets(lora_target_modules=("up_proj",), lora_target_parameters=("up_proj",))
    assert len(found.modules) == 3 and not any(".experts." in name for name in found.modules)
    assert found.parameters == (
        "model.layers.1.mixer.experts.up_proj",
        "model.layers.5.mixer.experts.up_proj",
    )


def test_a_path_and_an_expression_match_a_part():
    assert targets(lora_target_modules=("layers.2.mixer.q_proj",)).modules == ("model.layers.2.mixer.q_proj",)
    found = targets(lora_target_modules=(r"model\.layers\.[04]\.mixer\.in_proj",))
    assert found.modules == ("model.layers.0.mixer.in_proj", "model.layers.4.mixer.in_proj")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"lora_target_modules": ("q_porj",)},
            "'q_porj' matches nothing in this model; did you mean .*q_proj",
        ),
        ({"lora_target_modules": ("gate_proj",)}, "'gate_proj' matches nothing.*no gate"),
        ({"lora_target_modules": ("mixer.x_proj",)}, "matches nothing.*in_proj"),
        ({"lora_target_modules": ("fc1_latent_proj",)}, "matches nothing"),
        (
            {"lora_target_modules": ("lm_head",)},
            r"lm_head carries no LoRA here; train it whole with `lora_modules_to_save: \[lm_head\]`",
        ),
        ({"lora_target_modules": ("model.embed_tokens",)}, r"lora_modules_to_save: \[embeddings\]"),
        ({"lora_target_modules": ("gate",)}, "'gate' matches nothing"),
        (
            {"lora_target_linear": True, "lora_modules_to_save": ("gate",)},
            "'gate' cannot be trained whole beside a LoRA; there are embeddings, lm_head",
        ),
        ({"lora_target_parameters": ("experts.gate_up_proj",)}, "matches nothing.*no gate.*up_proj"),
        (
            {"lora_target_modules": ("conv1d",)},
            "conv1d cannot carry LoRA: the Mamba-2 kernels read its weight",
        ),
        ({"lora_target_modules": ("(q_proj",)}, "is not a regular expression"),
        ({}, "needs a target"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(adapter, message):
    with pytest.raises(ConfigError, match=message):
        targets(**adapter)


def test_scaling():
    section = {"adapter": "lora", "lora_r": 16, "lora_alpha": 8.0}
    assert strength_of(AdapterSection(**section), "x.q_proj") == (16, 0.5)
    assert strength_of(AdapterSection(**section, peft_use_rslora=True), "x.q_proj") == (16, 2.0)
    section |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 4.0}}
    assert strength_of(AdapterSection(**section, peft_use_rslora=True), "x.q_proj") == (4, 4.0)
    assert strength_of(AdapterSection(**section), "x.v_proj") == (16, 0.25)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("lm_head",), {"lm_head": "lm_head"}),
        (("embed_tokens",), {"embeddings": "model.embeddings"}),
        (("backbone.embeddings", "embedding"), {"embeddings": "model.embeddings"}),
        (("lm_head", "embeddings"), {"embeddings": "model.embeddings", "lm_head": "lm_head"}),
    ],
)
def test_modules_that_train_whole_go_by_several_names(names, found):
    model, saved = build(
        tiny_config(),
        AdapterSection(adapter="lora", lora_target_modules=("q_proj",), lora_modules_to_save=names),
        Precision(torch.bfloat16, torch.bfloat16),
        CPU,
    )
    assert saved.saved == found
    trains = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trains == {f"{path}.weight" for path in found.values()}
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trains)


@pytest.mark.parametrize("latent", [None, 32])
def test_the_names_from_config_json_are_those_of_the_model(latent):
    """The driver checks targets on these; the worker on the modules."""
    adapter = AdapterSection(
        adapter="lora", lora_target_linear=True, lora_target_parameters=("up_proj", "down_proj")
    )
    found = build(tiny_config(latent=latent), adapter, Precision(), CPU)[1]
    shape = tiny_config(latent=latent).to_dict()
    modules, parameters = find_targets(adapter, linear_paths(shape), expert_paths(shape))
    assert (tuple(modules), tuple(parameters)) == (found.modules, found.parameters)
    assert set(linear_paths(shape)) == set(found.modules)
