"""What each of two processes checks of a sharded LoRA; apart from the tests, so that it starts quickly."""

import torch
from torch import nn

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.adapter import load_adapter
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.sharding import local_rows
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.parallelize import Layout, parallelize
from tests.model.shapes import CPU, tiny_config

INITS = (True, "gaussian", "orthogonal")


def section_to_shard(init: object) -> AdapterSection:
    """Six rows of rank 6 lie over two workers as 3 and 3, one row of q_proj as 1 and 0."""
    return AdapterSection(
        adapter="lora",
        lora_r=6,
        lora_target_modules=("q_proj", "in_proj"),
        lora_target_parameters=("up_proj", "down_proj"),
        lora_modules_to_save=("lm_head", "embeddings"),
        rank_pattern={"q_proj": 2 if init == "orthogonal" else 1},
        peft_init_lora_weights=init,
    )


def compare_rows(rank: int, folder: str) -> None:
    """A worker's rows, new and loaded, are those of the whole tensors in `folder`."""
    for init in INITS:
        section = section_to_shard(init)
        model, _ = build(tiny_config(), section, Precision(), CPU)
        bind_loss(model)
        parallelize(model, Layout(1, 2), CPU, recompute=False, factors_whole=False)
        fill(model, None, seed=0, device=CPU, adapter_seed=1)
        assert_rows_of(model, torch.load(f"{folder}/fresh-{init}.pt"))
        load_adapter(model, section, f"{folder}/adapter-{init}")
        assert_rows_of(model, torch.load(f"{folder}/trained-{init}.pt"))


def assert_rows_of(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        local, first = local_rows(parameter)
        assert local.shape[0] < parameter.shape[0] or parameter.shape[0] == 1, "it is sharded"
        assert torch.equal(local.detach(), expected[name][first : first + len(local)]), name
