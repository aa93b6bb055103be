"""What `nemo-ray plan` says a GPU needs, beside what it took: steps of full-size models.

Everything is recomputed (gradient_checkpointing: true), since `auto` fills what is left. Ends with 1 where
the peak is further off than 5%, or what comes to the weights further than 10%.

    python benchmarks/plan_memory.py --out plan_memory.json [--cases r64,16k]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sizes import BILLION, NANO, SHAPES
from train_step import configure, measure, parse

from nemo_ray.plan import estimate_memory

GIB = 2**30
MOST_OFF, MOST_OFF_ABOVE = 0.05, 0.10
CASES: dict[str, tuple[str, ...]] = {
    "lora": ("--tokens", "8192"),
    "mamba": ("--tokens", "8192", "--mamba"),
    "no graphs": ("--tokens", "8192", "--mamba", "cuda_graphs=false"),
    "qlora": ("--tokens", "8192", "--adapter", "qlora"),
    "8-bit": ("--tokens", "4096", "--mamba", "--adapter", "qlora", "optimizer=adamw_8bit"),
    "super": (
        "--model",
        "super",
        "--tokens",
        "8192",
        "--mamba",
        "--adapter",
        "qlora",
        "lora_target_parameters=",
    ),
    "r64": ("--tokens", "4096", "lora_r=64", "--adapter", "qlora"),
    "16k": ("--tokens", "16384"),
    "two packs": ("--tokens", "4096", "micro_batch_size=2"),
    "1 B hybrid": ("--model", "BILLION", "--tokens", "8192", "--mamba"),
}


def case_arguments(name: str, folder: Path) -> list[str]:
    """The command line of benchmarks/train_step.py for a case."""
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads((SHAPES / f"{NANO}.json").read_text()) | BILLION | {"vocab_size": 131072})
    )
    words = [str(path) if word == "BILLION" else word for word in CASES[name]]
    return [*words, "--steps", "2", "--warmup", "2", "gradient_checkpointing=true"]


def compare(name: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """GiB planned and taken."""
    argv = case_arguments(name, folder)
    config, shape = configure(parse(argv), folder / "plan")
    planned = estimate_memory(config, shape, 1, use_gpu=True)
    found = measure("nemo_ray", argv, limit_s)
    if "failed" in found:
        return found
    taken = found["peak_reserved_gib"] * GIB
    weights = planned.peak - planned.above_weights
    return {
        "planned_gib": planned.peak / GIB,
        "taken_gib": taken / GIB,
        "allocated_gib": found["peak_allocated_gib"],
        "off": planned.peak / taken - 1,
        "off_above_weights": planned.above_weights / (taken - weights) - 1,
        "classes_gib": {kind: size / GIB for kind, size in planned.classes.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for a case")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results, bad = {}, False
    for name in arguments.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="plan-memory-") as folder:
            found = results[name] = compare(name, Path(folder), arguments.limit_s)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        if "failed" in found:
            bad = True
            print(f"{name:<12} failed: {found['failed']}", flush=True)
            continue
        bad |= abs(found["off"]) > MOST_OFF or abs(found["off_above_weights"]) > MOST_OFF_ABOVE
        print(
            f"{name:<12} planned {found['planned_gib']:6.2f}  taken {found['taken_gib']:6.2f} GiB  "
            f"{found['off']:+.1%}, above the weights {found['off_above_weights']:+.1%}",
            flush=True,
        )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
