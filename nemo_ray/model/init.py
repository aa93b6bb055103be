"""Random starting values, drawn row by row from a seed and a name: any sharding gives the same model."""

import hashlib
import math

import torch
from transformers import NemotronHConfig


def row_generator(seed: int, name: str, row: int, device: torch.device) -> torch.Generator:
    """The random stream of one row of the tensor `name`."""
    digest = hashlib.blake2b(f"{seed}/{name}/{row}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def initial_values(
    local: torch.Tensor, name: str, first: int, shape: tuple[int, ...], config: NemotronHConfig, seed: int
) -> None:
    """Fill rows [first, first + len(local)) of a base tensor of `shape`, as Nemotron-H is initialized.

    Norms and D are one, biases and the router's correction zero, A_log the logarithm of 1 to H, dt_bias the
    inverse softplus of a log-uniform step, out_proj scaled down by depth, all else normal.
    """
    leaf = name.rpartition(".")[2]
    if "norm" in name and leaf == "weight" or leaf == "D":
        local.fill_(1.0)
    elif leaf in ("bias", "e_score_correction_bias"):
        local.zero_()
    elif leaf == "A_log":
        local.copy_(torch.arange(first + 1, first + 1 + local.shape[0], dtype=torch.float32).log())
    elif leaf == "dt_bias":
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform = torch.rand(shape, generator=row_generator(seed, name, 0, torch.device("cpu")))
        dt = (uniform * (high - low) + low).exp().clamp(min=config.time_step_floor)
        local.copy_((dt + torch.log(-torch.expm1(-dt)))[first : first + local.shape[0]])
    elif name.endswith(("out_proj.weight", "conv1d.weight")):
        fan_in = math.prod(shape[1:])
        scale = math.sqrt(len(config.layers_block_type)) if name.endswith("out_proj.weight") else 1.0
        bound = 1 / math.sqrt(fan_in) / scale
        for row, values in enumerate(local):
            values.uniform_(-bound, bound, generator=row_generator(seed, name, first + row, local.device))
    else:
        _normal_rows(local, name, first, config.initializer_range, seed)


def _normal_rows(local: torch.Tensor, name: str, first: int, std: float, seed: int) -> None:
    for row, values in enumerate(local):
        values.normal_(0.0, std, generator=row_generator(seed, name, first + row, local.device))
