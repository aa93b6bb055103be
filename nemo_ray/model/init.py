"""Random starting values, in blocks of rows from a seed and a name: any sharding gives the same model."""

import hashlib
import math
from collections.abc import Callable

import torch
from transformers import NemotronHConfig

BLOCK_ROWS = 64  # of a matrix; a bank's row is an expert, drawn alone


def generator_of(seed: int, name: str, block: int, device: torch.device) -> torch.Generator:
    """The random stream of one block of rows of the tensor `name`."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_rows(
    local: torch.Tensor,
    name: str,
    first: int,
    seed: int,
    draw: Callable[[torch.Tensor, torch.Generator], object],
) -> None:
    """Fill `local`, rows [first, first + len(local)) of `name`, by `draw(block of rows, generator)`."""
    rows = 1 if local.dim() > 2 else BLOCK_ROWS
    stop = first + local.shape[0]
    for block in range(first // rows, -(-stop // rows)):
        values = local.new_empty((rows, *local.shape[1:]))
        draw(values, generator_of(seed, name, block, local.device))
        begin, end = max(first, block * rows), min(stop, (block + 1) * rows)
        local[begin - first : end - first] = values[begin - block * rows : end - block * rows]


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
        uniform = torch.rand(shape, generator=generator_of(seed, name, 0, torch.device("cpu")))
        dt = (uniform * (high - low) + low).exp().clamp(min=config.time_step_floor)
        local.copy_((dt + torch.log(-torch.expm1(-dt)))[first : first + local.shape[0]])
    elif name.endswith(("out_proj.weight", "conv1d.weight")):
        scale = math.sqrt(len(config.layers_block_type)) if name.endswith("out_proj.weight") else 1.0
        bound = 1 / math.sqrt(math.prod(shape[1:])) / scale
        draw_rows(local, name, first, seed, lambda t, g: t.uniform_(-bound, bound, generator=g))
    else:
        std = config.initializer_range
        draw_rows(local, name, first, seed, lambda t, g: t.normal_(0.0, std, generator=g))
