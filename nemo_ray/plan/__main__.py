"""`nemo-ray plan CONFIG.yaml`: what a run takes of which GPUs, before one is paid for."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemo_ray.errors import ConfigError, NemoRayError, tell
from nemo_ray.plan.gpus import GPUS, find_gpu

EPILOG = """\
examples:
  nemo-ray plan run.yaml --gpu h100 --num-gpus 8 --price 2.5
  nemo-ray plan run.yaml sequence_len=16384 --json

No GPU, weights or network are needed: config.json is enough, and those of the published models are known.
exit codes: 0 it fits, 1 it does not, 2 the configuration is wrong
"""
_MOST_READ_BYTES = 200 * 2**20
"""Of local data that is looked at for its tokens."""
_SHAPES = ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="nemo-ray plan",
        description="Say what a run takes: parameters, memory of a GPU by class, speed, time and cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    result.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key of the file")
    result.add_argument("--gpu", metavar="NAME", default="h100", help=f"{', '.join(GPUS)} (%(default)s)")
    result.add_argument("--num-gpus", metavar="N", type=int, help="default: ray.num_workers, else 1")
    result.add_argument("--price", metavar="PRICE", type=float, help="of a GPU hour, in any currency")
    result.add_argument("--json", action="store_true", help="print one JSON object instead")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse_intermixed_args(arguments)
    try:
        found = plan(given)
    except NemoRayError as error:
        return tell(error)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        from nemo_ray.plan.words import lines

        print("\n".join(lines(found)))
    return 0 if found["memory"]["fits"] else 1


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """All that is known, JSON-ready: bytes, seconds, tokens. Raises: ConfigError."""
    from nemo_ray.config.load import load_config
    from nemo_ray.config.schema import Config
    from nemo_ray.plan.options import PRICED_TOKENS, fewest_gpus, options, recommend
    from nemo_ray.plan.parameters import count_active, count_by_kind, count_lora

    config: Config = load_config(given.config, given.overrides, check_paths=False).config
    gpu = find_gpu(given.gpu)
    num_gpus = given.num_gpus if given.num_gpus is not None else _workers(config.ray.num_workers)
    if num_gpus < 1:
        raise ConfigError(f"--num-gpus: {num_gpus} is not valid; give 1 or more")
    if given.price is not None and given.price < 0:
        raise ConfigError(f"--price: {given.price:g} is not valid; give 0 or more")
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
            "cost": own.cost(tokens, given.price),
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
                "cost_of_100m_tokens": option.cost(PRICED_TOKENS, given.price),
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
    from nemo_ray.targets import read_shape

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


def count_tokens(config: Any) -> tuple[float, bool]:
    """Tokens that the run trains on, and whether they are known: of small local data, with its tokenizer."""
    from nemo_ray.plan.options import PRICED_TOKENS

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


if __name__ == "__main__":
    sys.exit(main())
