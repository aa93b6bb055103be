"""What will run, said before it runs, and what came of it, said at the end. Text only; no Ray, no torch."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.plan import Memory
from nemo_ray.run_dir import RunDir
from nemo_ray.targets import block_types
from nemo_ray.train import resources
from nemo_ray.train.progress import by_dataset, duration
from nemo_ray.train.resources import Demand

_KINDS = {"linear_attention": "Mamba-2", "full_attention": "attention", "moe": "MoE", "mlp": "MLP"}
_COMPLETION_CHARACTERS = 400
Row = tuple[str, str]


def gib(num_bytes: float) -> str:
    """12.3 GiB, or MiB below one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def plural(count: int, noun: str) -> str:
    """1 window, 2 windows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe_model(shape: Mapping[str, Any]) -> str:
    """Blocks and sizes from a config.json."""
    kinds = Counter(block_types(shape))
    blocks = ", ".join(f"{count} {_KINDS.get(kind, kind)}" for kind, count in kinds.items())
    text = f"{sum(kinds.values())} blocks ({blocks}), hidden {shape['hidden_size']}"
    if kinds["moe"]:
        text += f", {shape['n_routed_experts']} experts, top {shape['num_experts_per_tok']}"
    return f"{text}, vocabulary {shape['vocab_size']:,}"


def describe_adapter(config: Config) -> str:
    """What is trained."""
    if config.adapter is None:
        return "none: every weight is trained"
    banks = [name.rpartition(".")[2] for name in config.lora_target_parameters]
    targets = [*config.lora_target_modules, *(f"experts' {name}" for name in banks)]
    if config.lora_target_linear:
        targets.insert(0, "every linear layer")
    return f"{config.adapter}, r={config.lora_r}, alpha={config.lora_alpha:g}, on {', '.join(targets)}"


def describe_data(config: Config, plan: DataPlan, world_size: int) -> list[Row]:
    """Rows, and estimates of tokens and steps; shards that exist already change nothing here."""
    held_out = int(plan.eval_windows.num_rows.sum())
    tokens = plan.estimated_tokens(plan.windows)
    packs_per_step = world_size * config.micro_batch_size * config.gradient_accumulation_steps
    step_tokens = packs_per_step * plan.sequence_len
    num_steps = math.ceil(math.ceil(tokens / step_tokens) * config.num_epochs)
    epochs = f"{config.num_epochs:g} epoch{'' if config.num_epochs == 1 else 's'}"
    length = f"{epochs}, about {plural(num_steps, 'step')}"
    if config.max_steps is not None:
        length = f"{config.max_steps} steps"
    return [
        (
            "data",
            f"{plan.num_rows:,} rows, about {tokens:,.0f} tokens, in {plural(len(plan.windows), 'window')}; "
            f"{held_out:,} rows held out",
        ),
        (
            "step",
            f"{step_tokens:,} tokens: {plural(world_size, 'worker')} x "
            f"{plural(config.micro_batch_size, 'pack')} of {plan.sequence_len} "
            f"x {config.gradient_accumulation_steps} accumulated; {length}",
        ),
    ]


def data_lines(plan: DataPlan, run: RunDir) -> list[str]:
    """What became of the rows, once all are prepared; the rejected ones are counted by reason and listed."""
    statistics = data_statistics(plan)
    lines = [f"data: {line}" for line in describe(statistics)[len(plan.sources) :]]
    if run.rejected_file.exists():
        lines.append(f"data: rejected rows are listed in {run.shown(run.rejected_file)}")
    return lines


def describe_workers(wanted: Demand, config: Config, where: str) -> str:
    """How many workers, with what, laid out how."""
    each = " + ".join(f"{amount:g} {name}" for name, amount in sorted(wanted.per_worker.items()))
    layout = "as few to a copy of the base as hold it"
    if not resources.layout_is_open(config, wanted.use_gpu):
        sizes = resources.mesh(wanted.num_workers, config.dp_shard_size, config.dp_replicate_size)
        layout = f"mesh {sizes[0]} x {sizes[1]} (replicate x shard)"
    if wanted.at_least is not None:
        layout = layout if wanted.use_gpu else "sharded over all"
        return f"{wanted.at_least} to {wanted.num_workers} with {each} each, {layout}, on {where}"
    if wanted.num_workers == 1:
        layout = "mesh 1 x 1 (replicate x shard)"
    return f"{wanted.num_workers} with {each} each, {layout}, on {where}"


def describe_memory(memory: Memory) -> str:
    """The estimate of one worker, largest parts first."""
    parts = sorted(memory.classes.items(), key=lambda item: item[1], reverse=True)
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= 2**19)
    return f"about {gib(memory.peak)} of tensors a worker ({shown})"


def print_rows(console: Console, rows: list[Row]) -> None:
    """Names and values in two columns; on anything but a terminal one unbroken line each."""
    if not console.is_terminal:
        width = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            console.print(Text(f"{name:<{width}}{value}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)


def result_rows(run: RunDir, elapsed_s: float) -> list[Row]:
    """Held-out loss before and after, and where everything lies."""
    rows: list[Row] = []
    metrics = run.read_metrics()
    losses = [row for row in metrics if "eval_loss" in row]
    if len(losses) > 1:
        before, after = losses[0]["eval_loss"], losses[-1]["eval_loss"]
        change = f"{after / before - 1:+.1%}"
        after_step = f"{after:.4f} after step {losses[-1]['step']}"
        rows.append(("held-out loss", f"{before:.4f} before, {after_step} ({change})"))
        if per_dataset := by_dataset(losses[-1]):
            rows.append(("", f"after{per_dataset}"))
    steps = [row for row in metrics if "loss" in row]
    if steps:
        loss, skipped = steps[-1]["loss"], steps[-1]["nonfinite_steps"]
        last = "last loss not finite" if loss is None else f"last loss {loss:.4f}"
        rows.append(("steps", f"{steps[-1]['step']}, {last}"))
        if skipped:
            what = f"{plural(skipped, 'step')} without a finite loss or gradient"
            rows.append(("skipped", f"{what}; batches in {run.shown(run.nonfinite_dir)}"))
    rows += _chosen(run.read_run(), losses[-1]["step"] if losses else 0)
    newest = run.newest_checkpoint()
    places: list[tuple[str, Path | None]] = [
        ("adapter", run.adapter_dir),
        ("model", run.model_dir),
        ("checkpoint", newest),
        ("metrics", run.metrics_file),
        ("completions", run.completions_file),
        ("run", run.run_json),
    ]
    rows += [(name, run.shown(path)) for name, path in places if path is not None and path.exists()]
    return [*rows, ("time", duration(elapsed_s))]


def _chosen(facts: Mapping[str, Any], last_step: int) -> list[Row]:
    """Why the run ended before its time, and which was the best evaluation, where it was not the last."""
    best, stopped = facts.get("best"), facts.get("stopped_early")
    rows = []
    if stopped is not None:
        count = plural(stopped["evaluations_without_improvement"], "evaluation")
        rows.append(("stopped early", f"at step {stopped['step']}: {count} in a row brought nothing better"))
    if best is not None and best["step"] != last_step:
        exported = facts["exported_step"]
        kept = (
            "its weights are the result" if exported == best["step"] else f"the result is of step {exported}"
        )
        rows.append(("best", f"{best['metric']} {best['value']:.4f} at step {best['step']}; {kept}"))
    return rows


def print_completions(console: Console, run: RunDir) -> None:
    """Each prompt with what the model said before and after."""
    said: dict[str, dict[str, str]] = {}
    for row in run.read_completions():
        said.setdefault(row["prompt"], {}).setdefault(row["stage"], row["completion"])
        if row["stage"] == "after":
            said[row["prompt"]]["after"] = row["completion"]
    for prompt, stages in said.items():
        rows = [
            ("prompt", prompt),
            *((stage, stages[stage]) for stage in ("before", "after") if stage in stages),
        ]
        print_rows(console, [(name, _shown(text)) for name, text in rows])
        console.print()


def _shown(text: str) -> str:
    text = " ".join(text.split())
    if not text:
        return "(nothing)"
    return text if len(text) <= _COMPLETION_CHARACTERS else text[:_COMPLETION_CHARACTERS] + "..."
