"""A base with an adapter on it, ready to answer: whole on one device, in eval mode."""

from pathlib import Path

import torch
from transformers import NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.adapter import load_adapter
from nemo_ray.model.adapter_reader import read_adapter
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.peft_config import section_of


def load_for_inference(
    base_model: str, adapter_dir: str | Path | None, precision: Precision, device: torch.device
) -> NemotronHForCausalLM:
    """The patched model of the folder `base_model`, with the adapter of `adapter_dir` in place.

    Raises: ConfigError, CheckpointError where one of the two cannot be read or they do not fit.
    """
    adapter = AdapterSection()
    if adapter_dir is not None:
        adapter = section_of(read_adapter(adapter_dir).config)
    config = read_model_config(base_model)
    model, _ = build(config, adapter, precision, device)
    fill(model, base_model, seed=0, device=device, adapter_seed=0)
    if adapter_dir is not None:
        load_adapter(model, adapter, adapter_dir)
    model.requires_grad_(False)
    return model.eval()
