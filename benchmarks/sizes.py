"""What must fit on one GPU: peak memory and speed of full-size models through the real command.

Random weights of the published shapes (`reinit_weights`), the demo's chats packed. Prints a table, writes
JSON and exits with 1 where a case needs more memory than it may.

    python benchmarks/sizes.py --out OUT.json [--cases nano-qlora-4k,...] [--steps 8] [KEY=VALUE ...]
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nemo_ray" / "demo" / "assets"
SHAPES = ROOT / "nemo_ray" / "model" / "shapes"
GIB = 2**30
ATTENTION_AND_MAMBA = "lora_target_modules=[q_proj,k_proj,v_proj,o_proj,in_proj,out_proj]"
EXPERTS = "lora_target_parameters=[experts.up_proj,experts.down_proj]"
FOUR_BIT = ("adapter=qlora", "load_in_4bit=true", "quantize_moe_experts=true")
WARMUP_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A run of a published shape, and the GiB of reserved GPU memory that it may take."""

    shape: str
    sequence_len: int
    keys: tuple[str, ...]
    limit_gib: float


NANO, SUPER = "nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b"
# Over Nano's shape: a hybrid of 1.2 B parameters.
BILLION = {
    "hybrid_override_pattern": "MEMEM*E" * 5 + "MEMEME",
    "hidden_size": 1024,
    "vocab_size": 4096,
    "num_attention_heads": 16,
    "mamba_num_heads": 32,
    "n_routed_experts": 32,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 1536,
}
CASES = {
    "nano-qlora-4k": Case(NANO, 4096, (*FOUR_BIT, EXPERTS, "optimizer=adamw_8bit"), 22.5),
    "nano-qlora-8k": Case(NANO, 8192, (*FOUR_BIT, EXPERTS), 28.0),
    "nano-lora-8k": Case(NANO, 8192, ("adapter=lora", EXPERTS), 76.0),
    "super-qlora-8k": Case(SUPER, 8192, (*FOUR_BIT, "lora_target_parameters="), 74.0),
}


def write_base(folder: Path, shape: str) -> None:
    """A folder with the shape's config.json and the demo's tokenizer: no weights."""
    shutil.copytree(DEMO / "base", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copyfile(SHAPES / f"{shape}.json", folder / "config.json")


def run(
    case: Case, steps: int, folder: Path, overrides: list[str], log: Path, limit_s: float
) -> dict[str, Any]:
    """One run of the command, at most `limit_s` long; its figures, or the last line of what it said."""
    write_base(folder / "base", case.shape)
    out = folder / "out"
    command = [sys.executable, "-m", "nemo_ray.train", str(ROOT / "configs" / "quickstart.yaml")]
    command += [f"base_model={folder / 'base'}", "reinit_weights=true", f"output_dir={out}"]
    command += [f"sequence_len={case.sequence_len}", "micro_batch_size=1", f"max_steps={steps}"]
    command += ["gradient_checkpointing=true", "lora_r=16", "ray.num_workers=1", "learning_rate=1e-4"]
    command += ["completion_prompts=", "evals_per_epoch=", "saves_per_epoch=", "test_datasets="]
    command += [ATTENTION_AND_MAMBA, *case.keys, *overrides]
    with open(log, "w") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)  # twice: the second one ends it without a checkpoint
            child.send_signal(signal.SIGINT)
            code = child.wait(60)
    said = log.read_text().splitlines()
    if code != 0:
        return {"failed": said[-1] if said else f"exit code {code}"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps_s = [row["step_s"] for row in rows if "loss" in row][WARMUP_STEPS:]
    facts = json.loads((out / "run.json").read_text())
    estimate = next(line for line in said if line.startswith("memory"))
    return {
        "peak_gib": max(row["peak_memory_bytes"] for row in rows if "loss" in row) / GIB,
        "tokens_per_s": case.sequence_len / statistics.median(steps_s),
        "step_s": statistics.median(steps_s),
        "losses": [row["loss"] for row in rows if "loss" in row],
        "start": facts["start"],
        "estimate": estimate,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=WARMUP_STEPS + 4)
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds for a case")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    results, too_much = {}, False
    for name in arguments.cases.split(","):
        name, _, length = name.partition("@")  # nano-qlora-8k@65536: another length, without a limit
        case = CASES[name]
        if length:
            case = Case(case.shape, int(length), case.keys, float("inf"))
        with tempfile.TemporaryDirectory(prefix="sizes-") as folder:
            log = arguments.out.with_suffix(f".{name}.log")
            result = run(case, arguments.steps, Path(folder), arguments.overrides, log, arguments.limit_s)
        results[f"{name}@{case.sequence_len}"] = result
        too_much |= "failed" in result or result["peak_gib"] > case.limit_gib
        if "failed" in result:
            print(f"{name:<16}{case.sequence_len:>8} tokens  failed: {result['failed']}", flush=True)
        else:
            print(
                f"{name:<16}{case.sequence_len:>8} tokens  {result['peak_gib']:6.2f} of {case.limit_gib:g}"
                f"  {result['tokens_per_s']:8,.0f} tokens/s  start {result['start']}",
                flush=True,
            )
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
