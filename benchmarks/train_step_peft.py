"""What train_step.py measures against: plain transformers with PEFT's LoRA, set up as well as they allow.

The same random base and targets; HF's loss over whole logits, non-reentrant gradient checkpointing, float32
adapters, torch's fused AdamW. Packed documents are kept apart as transformers has it: `position_ids` for
attention, `seq_idx` for convolution and scan where their kernels are installed. The base is always dense: no
4-bit experts carry a LoRA in PEFT.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.utils import is_flash_attn_2_available

from nemo_ray.config.schema import Config
from nemo_ray.data.packing import Pack
from nemo_ray.model.load import fill, read_model_config
from nemo_ray.model.ssd import missing_kernels
from nemo_ray.targets import alpha_of, expert_paths, find_targets, linear_paths, read_shape, strength_of
from nemo_ray.train.worker import base_precision, configure_cuda

Step = Callable[[Sequence[Pack], int], torch.Tensor]


def make_peft(config: Config, device: torch.device) -> tuple[nn.Module, Step, str]:
    """The model, its optimizer step (packs, target tokens -> mean loss), and a word on how it was set up."""
    dtype = base_precision(config, device).compute
    if device.type == "cuda":
        configure_cuda(dtype, config.tf32)
    model_config = read_model_config(config.base_model)
    flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    model_config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    lora, refused = lora_config(config, model_config)
    with torch.device("meta"):
        base = NemotronHForCausalLM(model_config)
    for parameter in base.parameters():  # parameters only: the router's bias stays float32
        parameter.data = parameter.data.to(dtype)
    fill(base, None, seed=config.seed, device=device, adapter_seed=config.seed)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )
    kernels = device.type == "cuda" and missing_kernels(device) is None
    size, limit = config.micro_batch_size, config.max_grad_norm or float("inf")

    def step(packs: Sequence[Pack], num_targets: int) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for start in range(0, len(packs), size):
            micro = packs[start : start + size]
            share = sum(pack.num_targets for pack in micro) / num_targets
            loss = model(**inputs(micro, device, kernels), use_cache=False).loss * share
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    about = f"{str(dtype).removeprefix('torch.')} base, {model_config._attn_implementation}"
    return model, step, about + (f", without {', '.join(refused)}, which PEFT refuses" if refused else "")


def inputs(packs: Sequence[Pack], device: torch.device, kernels: bool) -> dict[str, torch.Tensor]:
    """Packs of T tokens as the model's arguments, (B, T) each."""

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(pack, name) for pack in packs])).to(device)

    batch = {name: stacked(name).long() for name in ("input_ids", "labels", "position_ids")}
    return {**batch, "seq_idx": stacked("seq_idx")} if kernels else batch


def lora_config(config: Config, model_config: NemotronHConfig) -> tuple[LoraConfig, list[str]]:
    """PEFT's form of the configuration's adapter, and the names of layers that PEFT takes no LoRA on."""
    adapter, shape = config.adapter_config, read_shape(config.base_model)
    modules, parameters = find_targets(adapter, linear_paths(shape), expert_paths(shape))

    def made(modules: Sequence[str]) -> LoraConfig:
        strengths: dict[str, dict[str, Any]] = {
            "rank_pattern": {path: strength_of(adapter, path).rank for path in (*modules, *parameters)},
            "alpha_pattern": {path: alpha_of(adapter, path) for path in (*modules, *parameters)},
        }
        return LoraConfig(
            r=adapter.lora_r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            use_rslora=adapter.peft_use_rslora,
            init_lora_weights=adapter.peft_init_lora_weights,
            target_modules=list(modules),
            target_parameters=list(parameters) or None,
            modules_to_save=list(adapter.lora_modules_to_save) or None,
            **(strengths if adapter.rank_pattern or adapter.alpha_pattern else {}),
        )

    kept = [path for path in modules if not path.endswith(".out_proj")]
    try:
        with torch.device("meta"):  # a trial: PEFT refuses while it replaces layers
            get_peft_model(NemotronHForCausalLM(model_config), made(modules))
    except ValueError:
        if kept == modules:
            raise
        return made(kept), ["out_proj"]
    return made(modules), []
