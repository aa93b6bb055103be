"""How fast one training step is: the product's own, and plain transformers + PEFT on the same machine.

A model of full size with random weights, packs of random tokens of which every one is a target. Each side
runs in a process of its own, one after the other, with the same base, allocator and Triton settings. Prints a
table; `--out` writes all of it as JSON, each step's time and loss too.

    python benchmarks/train_step.py --model nano --tokens 8192 --adapter lora --compare peft
    python benchmarks/train_step.py --model super --adapter qlora --documents natural lora_r=8

- tokens/s are those of the median step; a step lasts from the end of the one before to its own end.
- GPU busy is the time in which a kernel, copy or fill runs (overlaps count once; copies to or from the host
  do not count where nothing else runs), over that median step. The kernels are those of two more steps under
  the profiler, which slows the host alone.
- kernels run on the GPU; launches are calls of the host, and a graph of many kernels is one.
- FLOP: 2 for each weight that a token meets, forward, and 2 more for each gradient. A frozen base needs no
  gradients of its weights: 4 in all, where training all of it takes 6. Weights that a token does not meet
  (idle experts, the embedding table), attention scores, the scan, LoRA factors and what is recomputed count
  as nothing. MFU is that rate over the rate of a bf16 product of 8192 x 8192 matrices in the same process.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.packing import Pack, build_pack
from nemo_ray.errors import ConfigError, NemoRayError, tell
from nemo_ray.plan import count_active
from nemo_ray.targets import Shape, block_types, expert_paths, find_targets, linear_paths, read_shape
from nemo_ray.train.trace import summarize

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "nano": ROOT / "nemo_ray/model/shapes/nemotron-3-nano-30b-a3b.json",
    "super": ROOT / "nemo_ray/model/shapes/nemotron-3-super-120b-a12b.json",
}
# Every kind of block, for a CPU.
TINY = """{
  "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-ME", "vocab_size": 256, "hidden_size": 64,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
  "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
  "chunk_size": 32, "time_step_limit": [0.0, Infinity], "n_routed_experts": 16, "num_experts_per_tok": 4,
  "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128, "mlp_hidden_act": "relu2"
}"""
# As the product sets them for its workers.
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TRITON_CACHE_AUTOTUNING": "1"}
PACKAGES = ("nemo-ray", "torch", "triton", "transformers", "peft")
PACKAGES += ("mamba-ssm", "causal-conv1d", "bitsandbytes")
GIB = 2**30
PROFILED_STEPS = 2
HOT_SHARE = 0.5  # of the tokens' choices, with --skew
NATURAL_MEDIAN, NATURAL_SIGMA = 600, 1.0  # tokens of a document, lognormal
Step = Callable[[Sequence[Pack], int], torch.Tensor]


# -- what is measured ----------------------------------------------------------------------------


class Arguments(argparse.ArgumentParser):
    """Wrong arguments are one line, like any other mistake."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano, super, tiny, or a path of a config.json")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack: sequence_len")
    parser.add_argument("--adapter", choices=("lora", "qlora", "none"), default="lora")
    parser.add_argument("--mamba", action="store_true", help="LoRA on in_proj and out_proj too")
    parser.add_argument("--compare", choices=("peft", "none"), default="none")
    parser.add_argument("--documents", default="1024", help="tokens of each, or natural: drawn lengths")
    parser.add_argument("--skew", type=float, help="part of the experts that takes half of the choices")
    parser.add_argument("--steps", type=int, default=8, help="measured")
    parser.add_argument("--warmup", type=int, default=4, help="steps before that")
    parser.add_argument("--limit-s", type=float, default=1200.0, help="seconds for a side")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    fixed = re.fullmatch("[2-9]|[1-9][0-9]+", arguments.documents)
    for name, valid, rule in (
        ("tokens", 16 <= arguments.tokens <= 2**20, "16 to 1048576"),
        ("documents", fixed or arguments.documents == "natural", "2 or more, or natural"),
        ("skew", arguments.skew is None or 0 < arguments.skew < HOT_SHARE, f"between 0 and {HOT_SHARE}"),
        ("steps", arguments.steps >= 1, "1 or more"),
        ("warmup", arguments.warmup >= 0, "0 or more"),
        ("limit-s", arguments.limit_s > 0, "more than 0"),
    ):
        if not valid:
            value = getattr(arguments, name.replace("-", "_"))
            raise ConfigError(f"--{name}: {value!r} is not valid; give {rule}")
    return arguments


def configure(arguments: argparse.Namespace, folder: Path) -> tuple[Config, Shape]:
    """The run's configuration, by the product's own rules, and the model's config.json."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    if arguments.model == "tiny":
        text = TINY
    else:
        path = SHAPES.get(arguments.model, Path(arguments.model))
        if not path.is_file():
            raise ConfigError(
                f"--model: {arguments.model!r} is no model; give nano, super, tiny or a path of a config.json"
            )
        text = path.read_text(encoding="utf-8")
    (base / "config.json").write_text(text, encoding="utf-8")
    keys: dict[str, Any] = {
        "base_model": str(base),
        "reinit_weights": True,
        "datasets": [{"path": str(base)}],  # must be named; nothing is read from it
        "output_dir": str(folder / "out"),
        "sequence_len": arguments.tokens,
        "gradient_checkpointing": "auto",
        "cuda_graphs": True,
        "learning_rate": 1e-4,
        "adapter": arguments.adapter,
    }
    if arguments.adapter != "none":
        mamba = ["in_proj", "out_proj"] if arguments.mamba else []
        keys["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", *mamba]
        keys["lora_target_parameters"] = ["experts.up_proj", "experts.down_proj"]
    if arguments.adapter == "qlora":
        keys |= {"load_in_4bit": True, "quantize_moe_experts": True}
    (folder / "config.yaml").write_text(json.dumps(keys), encoding="utf-8")
    config = load_config(str(folder / "config.yaml"), arguments.overrides).config
    shape = read_shape(config.base_model)
    if config.adapter:
        find_targets(config.adapter_config, linear_paths(shape), expert_paths(shape))
    if arguments.compare == "peft" and not config.adapter:
        raise ConfigError("--compare: peft trains adapters; give --adapter lora, or --compare none")
    if arguments.skew and "moe" not in block_types(shape):
        raise ConfigError(f"--skew: {arguments.model} has no routed experts; remove it")
    return config, shape


def draw_lengths(documents: str, tokens: int, generator: np.random.Generator) -> list[int]:
    """Lengths of the documents of a pack; the last one is cut to fit."""
    lengths: list[int] = []
    while left := tokens - sum(lengths):
        drawn = generator.lognormal(math.log(NATURAL_MEDIAN), NATURAL_SIGMA)
        size = max(2, round(drawn)) if documents == "natural" else int(documents)
        lengths.append(min(size, left))
    return lengths


def make_pack(lengths: Sequence[int], vocab_size: int, generator: np.random.Generator) -> Pack:
    """A full pack of random ids, each of them a target (but the first of a document: nothing predicts it)."""
    tokens, rows = sum(lengths), np.arange(len(lengths), dtype=np.int64)
    ids = generator.integers(0, vocab_size, tokens, dtype=np.int32)
    sizes = np.array(lengths, dtype=np.int32)
    return build_pack(ids, np.ones(tokens, np.uint8), sizes, rows, 0, tokens, pad_id=0)


# -- one side, in its own process ----------------------------------------------------------------


def run_side(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the side's model, warm it up, time it, profile it."""
    config, shape = configure(arguments, folder)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(config.seed)
    result: dict[str, Any] = {}
    if cuda:
        result["matmul_tflops"] = matmul_tflops()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, step, result["setup"] = SIDES[arguments.side](config, device, folder)
    if arguments.skew:
        result["routing"] = skew_routing(model, arguments.skew, device)
    generator = np.random.default_rng(config.seed)
    num_packs = config.micro_batch_size * config.gradient_accumulation_steps

    def draw_pack() -> Pack:
        lengths = draw_lengths(arguments.documents, config.sequence_len, generator)
        return make_pack(lengths, shape["vocab_size"], generator)

    def draw_steps(count: int) -> list[list[Pack]]:
        return [[draw_pack() for _ in range(num_packs)] for _ in range(count)]

    warmup = time_steps(step, draw_steps(arguments.warmup), device)
    measured = time_steps(step, draw_steps(arguments.steps), device)
    step_ms, tokens = statistics.median(measured["times_ms"]), num_packs * config.sequence_len
    result |= {
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / step_ms * 1e3,
        "step_ms": step_ms,
        "warmup": warmup,
        "measured": measured,
        "first_loss": (warmup["losses"] + measured["losses"])[0],
    }
    if cuda:
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        result["profile"] = profile_steps(step, draw_steps(PROFILED_STEPS), folder)
        profile = result["profile"]
        result["gpu_busy"] = (profile["busy_ms"] - profile["host_copies_alone_ms"]) / step_ms
    return result


def make_own_side(config: Config, device: torch.device, folder: Path) -> tuple[nn.Module, Step, str]:
    """What a worker of the product makes, with the step that it takes."""
    from nemo_ray.train.update import Update, compile_kernels
    from nemo_ray.train.worker import base_precision, configure_cuda, make_trainee

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    precision = base_precision(config, device)
    if device.type == "cuda":
        configure_cuda(precision.compute, config.tf32)
    trainee, _ = make_trainee(config, config.base_model, device, precision)
    if device.type == "cuda":
        compile_kernels(trainee, config.micro_batch_size, config.sequence_len)
    update, says = Update(trainee, config.train), ""
    if device.type == "cuda" and isinstance(config.gradient_checkpointing, str):
        kept = update.keep_activations(config.sequence_len)
        says = f"; blocks that keep activations: {blocks(kept.on_gpu)}"
        says += f", on the host: {blocks(kept.on_host)}" if kept.on_host else ""

    def step(packs: Sequence[Pack], num_targets: int) -> torch.Tensor:
        loss_sum, _ = update(packs, num_targets, config.learning_rate)
        return loss_sum / num_targets

    held = "4-bit" if config.load_in_4bit else str(precision.weights).removeprefix("torch.")
    return trainee.model, step, f"{held} base{says}"


def blocks(counts: dict[str, int]) -> str:
    """11 moe, 3 mlp"""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def make_peft_side(config: Config, device: torch.device, folder: Path) -> tuple[nn.Module, Step, str]:
    from train_step_peft import make_peft

    return make_peft(config, device)


SIDES = {"nemo_ray": make_own_side, "peft": make_peft_side}


def skew_routing(model: nn.Module, part: float, device: torch.device) -> dict[str, float]:
    """Make the first `part` of the experts of each layer take half of the choices, and count that they do.

    A router chooses the experts of the highest sigmoid(logit) + e_score_correction_bias, and weighs them
    without that bias. In one forward pass over random tokens each router's bias of the first experts is
    searched by bisection as its input arrives; a second pass over other tokens counts the choices.
    """
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    layers = [module for module in model.modules() if isinstance(module, NemotronHMoE)]
    num_experts, top_k = layers[0].gate.num_experts, layers[0].gate.top_k
    num_hot = math.ceil(part * num_experts)
    shares = []

    def hot_share(chosen: torch.Tensor) -> float:
        return float((chosen < num_hot).float().mean())

    def search(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        scores = F.linear(inputs[0].flatten(0, -2).float(), layer.gate.weight.float()).sigmoid()
        bias, low, high = torch.zeros_like(scores[0]), 0.0, 1.0  # at 1 no other expert is chosen
        for _ in range(16):
            middle = (low + high) / 2
            bias[:num_hot] = middle
            enough = hot_share((scores + bias).topk(top_k).indices) >= HOT_SHARE
            low, high = (low, middle) if enough else (middle, high)
        layer.gate.e_score_correction_bias.copy_(bias)

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _, _, chosen = layer.gate(inputs[0])
        shares.append(hot_share(chosen))

    model.eval()
    for hook in (search, count):
        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
        ids = torch.randint(0, model.config.vocab_size, (1, 1024), device=device)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
    model.train()
    return {
        "hot_experts": num_hot,
        "experts": num_experts,
        "wanted_share": HOT_SHARE,
        "share": statistics.mean(shares),
        "lowest_share": min(shares),
        "highest_share": max(shares),
    }


def time_steps(step: Step, batches: Sequence[Sequence[Pack]], device: torch.device) -> dict[str, Any]:
    """Milliseconds and loss of each step, and the seconds of all of them.

    A step lasts from the end of the one before: what the host adds is in it. On a GPU the ends are events in
    its queue, and the host waits once, after the last step.
    """

    def mark() -> Any:
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    began = time.perf_counter()
    marks, losses = [mark()], []
    for packs in batches:
        losses.append(step(packs, sum(pack.num_targets for pack in packs)))
        marks.append(mark())
    if device.type == "cpu":
        times = [1e3 * (end - start) for start, end in pairwise(marks)]
    else:
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in pairwise(marks)]
    wall_s = time.perf_counter() - began
    return {"times_ms": times, "losses": [float(loss) for loss in losses], "wall_s": wall_s}


def matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    """Median rate of a bf16 product of random square matrices on this GPU."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 2 * size**3 / statistics.median(a.elapsed_time(b) for a, b in times[5:]) / 1e9


# -- the profile ---------------------------------------------------------------------------------


def profile_steps(step: Step, batches: Sequence[Sequence[Pack]], folder: Path) -> dict[str, Any]:
    """The figures of `summarize` for these steps."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for packs in batches:
            step(packs, sum(pack.num_targets for pack in packs))
        torch.ones(1, device="cuda")  # the last launch: calls after it are the profiler's
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return summarize(events, len(batches))


# -- both sides, and what is said of them --------------------------------------------------------


def side_process(arguments: argparse.Namespace) -> int:
    """Leave the side's figures, or that memory ran out, in the folder."""
    try:
        result = run_side(arguments, arguments.folder)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        traceback.print_exc()
        result = {"failed": f"out of memory ({torch.cuda.max_memory_reserved() / GIB:.1f} GiB reserved)"}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    (arguments.folder / "result.json").write_text(json.dumps(result))
    return 0


def measure(side: str, argv: Sequence[str], limit_s: float) -> dict[str, Any]:
    """The figures of one side, from a process of its own; or {"failed": why}."""
    with tempfile.TemporaryDirectory(prefix="train-step-") as name:
        folder = Path(name)
        command = [sys.executable, __file__, *argv, "--side", side, "--folder", name]
        try:
            child = subprocess.run(
                command, env=ENVIRONMENT | os.environ, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {limit_s:g} s"}
        if (folder / "result.json").exists():
            return json.loads((folder / "result.json").read_text())
        print(child.stderr, file=sys.stderr)
        said = child.stderr.strip().splitlines()
        return {"failed": f"exit code {child.returncode}" + (f": {said[-1]}" if said else "")}


def add_rates(result: dict[str, Any], flop: Mapping[str, Any]) -> None:
    """Model TFLOP/s by both rules, and where a matrix product was measured, MFU of the chosen one."""
    if "failed" in result:
        return
    result["model_tflops"] = result["tokens_per_s"] * flop["per_token"] / 1e12
    result["model_tflops_if_all_trained"] = result["tokens_per_s"] * 6 * flop["active_parameters"] / 1e12
    if "matmul_tflops" in result:
        result["mfu"] = result["model_tflops"] / result["matmul_tflops"]


COLUMNS = {  # heading: figure and format; a column that no side has is left out
    "tokens/s": ("tokens_per_s", ",.0f"),
    "step ms": ("step_ms", ",.1f"),
    "GiB reserved": ("peak_reserved_gib", ".2f"),
    "TFLOP/s": ("model_tflops", ".3g"),
    "(at 6 FLOP)": ("model_tflops_if_all_trained", ".3g"),
    "MFU": ("mfu", ".1%"),
    "GPU busy": ("gpu_busy", ".0%"),
    "kernels": ("kernels", ",.0f"),
    "launches": ("launches", ",.0f"),
    "syncs": ("synchronizations", ",.0f"),
    "first loss": ("first_loss", ".4f"),
}


def print_table(sides: Mapping[str, dict[str, Any]], flop: Mapping[str, Any]) -> None:
    rows = {name: result | result.get("profile", {}) for name, result in sides.items()}
    shown = {
        heading: column
        for heading, column in COLUMNS.items()
        if any("failed" not in row and column[0] in row for row in rows.values())
    }
    print(f"{'':<10}" + "".join(f"{heading:>{max(9, len(heading) + 2)}}" for heading in shown))
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:<10}  {row['failed']}")
            continue
        cells = [(max(9, len(heading) + 2), row[key], form) for heading, (key, form) in shown.items()]
        print(f"{name:<10}" + "".join(f"{figure:>{width}{form}}" for width, figure, form in cells))
    for name, row in rows.items():
        if "setup" in row:
            print(f"\n{name}: {row['setup']}")
        if "routing" in row:
            routing = row["routing"]
            print(
                f"  {routing['hot_experts']} of {routing['experts']} experts took {routing['share']:.1%} of "
                f"the choices ({routing['lowest_share']:.1%} to {routing['highest_share']:.1%} by layer)"
            )
        if "profile" in row:
            classes = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["class_ms"].items())
            print(f"  GPU ms a step: {classes}; copies to the host: {row['copies_to_host']:g}")
            for kernel in row["largest"][:10]:
                print(
                    f"  {kernel['ms']:9.2f} ms {kernel['calls']:7,.0f} calls  {kernel['class']:<14}"
                    f"{kernel['name'][:100]}"
                )
    print(f"\nTFLOP/s{' and MFU' if 'MFU' in shown else ''}: {flop['rule']}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        if arguments.side:
            return side_process(arguments)
        with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
            config, shape = configure(arguments, Path(folder))
    except NemoRayError as error:
        return tell(error)
    active, each = count_active(shape), 4 if config.adapter else 6
    flop = {
        "active_parameters": active,
        "per_token": each * active,
        "rule": f"{each} FLOP a token for each of {active:,} active parameters"
        + (", which are frozen" if each == 4 else ""),
    }
    sides = {}
    for side in ("nemo_ray", "peft") if arguments.compare == "peft" else ("nemo_ray",):
        print(f"measuring {side} ...", file=sys.stderr, flush=True)
        sides[side] = measure(side, sys.argv[1:] if argv is None else argv, arguments.limit_s)
        add_rates(sides[side], flop)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    length = "natural length" if arguments.documents == "natural" else f"{arguments.documents} tokens"
    print(
        f"{arguments.model}, {config.adapter or 'all weights'}, packs of {config.sequence_len:,} tokens, "
        f"documents of {length}, on {device}\n"
    )
    print_table(sides, flop)
    if arguments.out:
        report = {
            "model": arguments.model,
            "documents": arguments.documents,
            "device": device,
            "versions": versions(),
            "config": config.to_dict(),
            "flop": flop,
            "sides": sides,
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    failures = [result["failed"] for result in sides.values() if "failed" in result]
    return int(any(not failure.startswith("out of memory") for failure in failures))


def versions() -> dict[str, str]:
    """Of what runs, as far as it is installed; Python's too."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
