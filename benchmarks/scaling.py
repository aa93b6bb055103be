"""What more GPUs of one host bring: tokens/s for each of them by layout, through the training command.

Nano's shape with random weights, LoRA on attention and experts, the demo's chats packed. Each run is a
process of its own, all in turns on one machine:

- one: one GPU;
- accumulated: one GPU that takes the packs of all workers in a step, whose losses the others must have;
- copies: every GPU holds the whole base, and only the adapters' gradients are sent;
- sharded: FSDP2 over all of them;
- hybrid (4 GPUs or more): sharded over half of them, and two copies;
- chosen: neither size given;
- killed: copies; one worker is killed in the middle, and the run goes on from its checkpoint.

Prints a table and writes JSON. Communication a step, and the part of it that nothing hides, come from a
profile of two steps. `held` is the time for which the second checkpoint kept training from going on, `slower`
by how much longer the eight steps after it are, by their median, since some record a graph; `--brief` leaves
both out, and ends after the profile. Ends with 1 where a run failed, or where losses are further from those
of the accumulated run than bf16 explains.

    python benchmarks/scaling.py --gpus 2 --out scaling.json
    python benchmarks/scaling.py --gpus 2 --model tiny     # on CPUs, over gloo
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sizes import ATTENTION_AND_MAMBA, DEMO, EXPERTS, NANO, ROOT, SUPER, write_base
from workers import workers_of

GIB = 2**30
SKIPPED = 4  # steps, which compile and record
TIMED = range(SKIPPED + 1, 41)  # the steps whose times count; two that are profiled follow
SAVE_STEPS = 48
BESIDE_SAVING = range(2 * SAVE_STEPS + 1, 2 * SAVE_STEPS + 9)
STEPS = BESIDE_SAVING[-1]  # the first checkpoint allocates, the second is measured, the third ends the run
BRIEF = TIMED[-1] + 2
ATTENTION = "lora_target_modules=[q_proj,k_proj,v_proj,o_proj]"
LOSS_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Model:
    keys: tuple[str, ...]
    shape: str | None = None
    """None: the demo's base, as it is."""


RANDOM = ("reinit_weights=true", "gradient_checkpointing=auto", "cuda_graphs=true")
FOUR_BITS = ("adapter=qlora", "load_in_4bit=true", "quantize_moe_experts=true")
MODELS = {
    "tiny": Model(("sequence_len=512", ATTENTION, EXPERTS, "lora_r=16", *RANDOM)),
    "nano": Model((*RANDOM, "sequence_len=8192", ATTENTION, EXPERTS, "lora_r=16"), NANO),
    "super": Model(
        (*FOUR_BITS, *RANDOM, "sequence_len=4096", ATTENTION_AND_MAMBA, EXPERTS, "lora_r=8"),
        SUPER,
    ),
}


def variants(gpus: int) -> dict[str, tuple[str, ...]]:
    """The keys of each run."""
    all_of_them, steps = f"ray.num_workers={gpus}", "gradient_accumulation_steps"
    runs = {
        "one": ("ray.num_workers=1", f"{steps}=1"),
        "accumulated": ("ray.num_workers=1", f"{steps}={gpus}"),
        "copies": (all_of_them, f"{steps}=1", "dp_shard_size=1"),
        "sharded": (all_of_them, f"{steps}=1", f"dp_shard_size={gpus}"),
        "hybrid": (all_of_them, f"{steps}=1", f"dp_shard_size={gpus // 2}", "dp_replicate_size=2"),
        "chosen": (all_of_them, f"{steps}=1"),
        "killed": (all_of_them, f"{steps}=1", "dp_shard_size=1", "ray.max_failures=1"),
    }
    if gpus < 4:
        del runs["hybrid"]
    return runs


def kill_a_worker(pid: int, out: Path, step: int, limit_s: float) -> None:
    """End one of the workers of the run of process `pid` by SIGKILL, once it has logged `step`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        rows = out / "metrics.jsonl"
        if rows.exists() and any(
            json.loads(line).get("step", 0) >= step for line in rows.read_text().splitlines()
        ):
            os.kill(workers_of(pid)[-1], signal.SIGKILL)
            return
        time.sleep(0.2)


def run(
    model: Model, keys: tuple[str, ...], arguments: argparse.Namespace, folder: Path, name: str
) -> dict[str, Any]:
    """One run of the command; its figures, or the last line of what it said."""
    out, log = folder / name, folder / f"{name}.log"
    command = [sys.executable, "-m", "nemo_ray.train", str(ROOT / "configs" / "quickstart.yaml")]
    command += [
        f"base_model={folder / 'base'}",
        f"output_dir={out}",
        f"max_steps={BRIEF if arguments.brief else STEPS}",
    ]
    command += [f"dataset_prepared_path={folder / 'prepared'}", "micro_batch_size=1", "learning_rate=1e-4"]
    command += ["completion_prompts=", "evals_per_epoch=", "saves_per_epoch=", "test_datasets="]
    command += [f"save_steps={SAVE_STEPS}", "profiler_steps=2", f"profiler_steps_start={TIMED[-1]}"]
    command += [*model.keys, *keys, *arguments.overrides]
    with open(log, "w") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            if name == "killed":
                kill_a_worker(child.pid, out, BESIDE_SAVING[0], arguments.limit_s)
            code = child.wait(arguments.limit_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)  # twice: the second one ends it without a checkpoint
            child.send_signal(signal.SIGINT)
            code = child.wait(60)
    if arguments.out:
        shutil.copyfile(log, arguments.out.with_suffix(f".{name}.log"))
    if code != 0:
        said = log.read_text().splitlines()
        return {"failed": said[-1] if said else f"exit code {code}"}
    facts = json.loads((out / "run.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    timed = [row for row in rows if row["step"] in TIMED]
    saving = [row for row in rows if row["step"] in BESIDE_SAVING]
    step_s = statistics.median(row["step_s"] for row in timed)
    return {
        "mesh": facts["mesh"],
        "workers": facts["world_size"],
        "step_s": step_s,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in timed),
        "held_s": saving[0]["checkpoint_s"] if saving else None,
        "slower": statistics.median(row["step_s"] for row in saving) / step_s - 1 if saving else None,
        "peak_gib": max(row["peak_memory_bytes"] for row in rows) / GIB,
        "losses": [row["loss"] for row in rows],
        "step_times": [row["step_s"] for row in rows],
        "start": facts["start"],
        "kept": facts.get("kept_activations"),
        "profile": facts.get("profile", {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="nano")
    parser.add_argument("--runs", help="some of them, with commas between; all by default")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for a run")
    parser.add_argument("--brief", action="store_true", help="without checkpoints; killed needs them")
    parser.add_argument("--out", type=Path, help="JSON file to write; the runs' logs beside it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    model, runs = MODELS[arguments.model], variants(arguments.gpus)
    names = arguments.runs.split(",") if arguments.runs else list(runs)
    results: dict[str, dict[str, Any]] = {}
    bad = False
    print(
        f"{'':<12} {'mesh':>7} {'tokens/s a GPU':>15} {'of one':>7} {'step s':>8} {'GiB':>6} {'loss off':>9} "
        f"{'sent ms':>8} {'alone':>6} {'held s':>7} {'slower':>7}"
    )
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        if model.shape is None:
            shutil.copytree(DEMO / "base", folder / "base")
        else:
            write_base(folder / "base", model.shape)
        for name in names:
            found = results[name] = run(model, runs[name], arguments, folder, name)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")
            if "failed" in found:
                bad = True
                print(f"{name:<12} failed: {found['failed']}", flush=True)
                continue
            found["per_gpu"] = found["tokens_per_s"] / found["workers"]
            one, reference = results.get("one", {}), results.get("accumulated", {})
            share = f"{found['per_gpu'] / one['per_gpu']:.3f}" if "per_gpu" in one else ""
            off = ""
            if name != "one" and "losses" in reference:
                pairs = zip(found["losses"], reference["losses"], strict=True)
                apart = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
                off, bad = f"{apart:.1e}", bad or apart > LOSS_TOLERANCE
            profile = found["profile"]
            sent_ms = profile.get("class_ms", {}).get("communication", 0.0)
            alone_ms = profile.get("communication_alone_ms", 0.0)
            saving = "" if found["held_s"] is None else f"{found['held_s']:>7.2f} {found['slower']:>7.1%}"
            mesh = f"{found['mesh']['replicate']} x {found['mesh']['shard']}"
            print(
                f"{name:<12} {mesh:>7} {found['per_gpu']:>15,.0f} {share:>7} {found['step_s']:>8.3f} "
                f"{found['peak_gib']:>6.1f} {off:>9} "
                f"{sent_ms:>8.1f} {alone_ms:>6.1f} {saving}",
                flush=True,
            )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
