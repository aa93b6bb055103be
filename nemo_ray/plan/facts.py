"""What is known of a run before it: from a configuration to figures, JSON-ready."""

import math
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.plan.gpus import find_gpu
from nemo_ray.plan.options import PRICED_TOKENS, fewest_gpus, options, recommend
from nemo_ray.plan.parameters import count_active, count_by_kind, count_lora
from nemo_ray.targets import read_shape

_MOST_READ_BYTES = 200 * 2**20
"""Of local data that is looked at for its tokens."""
_SHAPES = ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b")


def plan_facts(
    config: Config, gpu_name: str, num_gpus: int | None = None, price: float | None = None
) -> dict[str, Any]:
    """All that is known: bytes, seconds, tokens.

    Args:
        num_gpus: None for ray.num_workers, else 1.
        price: of a GPU hour.

    Raises: ConfigError.
    """
    gpu = find_gpu(gpu_name)
    if num_gpus is None:
        num_gpus = _workers(config.ray.num_workers)
    if num_gpus < 1:
        raise ConfigError(f"--num-gpus: {num_gpus} is not valid; give 1 or more")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price: {price:g} is not valid; give a finite number, 0 or more")
    shape, name = find_shape(config.base_model)
    found = options(config, shape, gpu, num_gpus)
    own, best = found[0], recommend(found)
    counts = count_by_kind(shape)
    total = sum(counts.values())
    trained = count_lora(config, shape) if config.adapter else total
    tokens, known = count_tokens(config)
    return {
        "model": {
            "shape": name,
            "parameters": total,
            "by_kind": counts,
            "active": count_active(shape),
            "trained": trained,
            "trained_share": trained / (total + trained if config.adapter else total),
        },
        "gpu": {"name": gpu.name, "memory_bytes": int(gpu.memory_bytes), "count": num_gpus},
        "mesh": {"replicate": own.replicate, "shard": own.shard},
        "memory": {
            "classes": dict(own.memory.classes),
            "peak": own.memory.peak,
            "fits": own.fits,
            "micro_batch_tokens": config.micro_batch_size * config.sequence_len,
            "most_micro_batch_tokens": own.most_tokens,
            "fewest_gpus": fewest_gpus(config, shape, gpu),
        },
        "speed": {
            "tokens_per_s_of_a_gpu": own.speed.tokens_per_s,
            "tokens_per_s": own.tokens_per_s,
            "from": own.speed.source,
        },
        "data": {
            "tokens": tokens,
            "known": known,
            "per": "run" if known else f"{PRICED_TOKENS:,} tokens",
            "seconds": None if (hours := own.hours(tokens)) is None else hours * 3600,
            "cost": own.cost(tokens, price),
        },
        "options": [
            {
                "name": option.name,
                "keys": dict(option.keys),
                "mesh": {"replicate": option.replicate, "shard": option.shard},
                "peak": option.memory.peak,
                "fits": option.fits,
                "most_micro_batch_tokens": option.most_tokens,
                "tokens_per_s": option.tokens_per_s,
                "hours_of_100m_tokens": option.hours(PRICED_TOKENS),
                "cost_of_100m_tokens": option.cost(PRICED_TOKENS, price),
                "recommended": option is best,
            }
            for option in found
        ],
    }


def _workers(asked: int | tuple[int, int] | None) -> int:
    return asked[1] if isinstance(asked, tuple) else asked or 1


def find_shape(base_model: str) -> tuple[Mapping[str, Any], str]:
    """The model's config.json, from its folder, else of the published model of that name; and what it is.

    Raises: ConfigError where neither is there.
    """
    if (Path(base_model) / "config.json").is_file():
        return read_shape(base_model), base_model
    plain = re.sub(r"[^a-z0-9]+", "-", base_model.lower())
    for shape in _SHAPES:
        if shape.removeprefix("nemotron-3-") in plain:
            text = files("nemo_ray.model").joinpath("shapes", f"{shape}.json").read_text(encoding="utf-8")
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(text, encoding="utf-8")
                return read_shape(folder), f"{shape}, as published"
    raise ConfigError(
        f"base_model: {base_model} is no folder with a config.json here, and no published model whose shape "
        f"is known ({', '.join(_SHAPES)}); give the folder, its config.json is enough"
    )


def count_tokens(config: Config) -> tuple[float, bool]:
    """Tokens that the run trains on, and whether they are known: of small local data, with its tokenizer."""
    step = config.micro_batch_size * config.sequence_len * config.gradient_accumulation_steps
    step *= _workers(config.ray.num_workers)
    if config.max_steps is not None:
        return float(config.max_steps * step), True
    paths = [Path(spec.path) for spec in (*config.datasets, *config.test_datasets)]
    sizes = [path.stat().st_size for path in paths if path.is_file()]
    tokenizer = (Path(config.base_model) / "tokenizer.json").is_file()
    if len(sizes) < len(paths) or sum(sizes) > _MOST_READ_BYTES or not tokenizer:
        return float(PRICED_TOKENS), False
    from nemo_ray.data.sources import plan_data

    with tempfile.TemporaryDirectory() as folder:
        found = plan_data(config.data, config.base_model, os.path.join(folder, "prepared"))
    return found.estimated_tokens(found.windows) * config.num_epochs, True
