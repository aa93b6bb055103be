"""What Ray Train runs on each worker: build the parts, hand them to the loop, export what was trained.

It owns the order in which the parts are made. Ray is used for the rank, the device and `report`, no more.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from nemo_ray import hub
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import repairer
from nemo_ray.data.tokenizer import TOKENIZER_DEFAULT
from nemo_ray.model.adapter import load_adapter, save_adapter
from nemo_ray.model.decode import generate_tokens
from nemo_ray.model.load import Precision, build, count_parameters, fill, read_model_config
from nemo_ray.model.lora import LoraTargets
from nemo_ray.model.prompt import read_tokenizer
from nemo_ray.model.saving import SavedBase, save_model
from nemo_ray.model.selftest import self_test
from nemo_ray.model.ssd import missing_kernels
from nemo_ray.plan import FULL, Memory, estimate_memory, flop_per_token, seen_gpu
from nemo_ray.run_dir import RunDir
from nemo_ray.targets import read_shape
from nemo_ray.train.checkpoint import TrainState, load_checkpoint, load_weights
from nemo_ray.train.logs import placed
from nemo_ray.train.loop import Trainer
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.optim import make_optimizer
from nemo_ray.train.parallelize import Layout, parallelize
from nemo_ray.train.ray_metrics import RayMetrics
from nemo_ray.train.remote_run import connect
from nemo_ray.train.starting import choose_checkpoint, take_over
from nemo_ray.train.trackers import open_trackers
from nemo_ray.train.trackers.forwarder import Tracker
from nemo_ray.train.update import Trainee, compile_kernels
from nemo_ray.train.watchdog import Watchdog
from nemo_ray.urls import is_url

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is told; picklable."""

    config: Config
    plan: DataPlan
    output_dir: str
    service: Any = None
    """The actor that keeps the run's directory, where `output_dir` is a URL."""
    pause_after: int | None = None
    """The evaluation, counted from 1, after which it saves and ends, as if a stop were asked for."""

    def run_dir(self) -> RunDir:
        """The run's directory as a worker has it."""
        return connect(self.output_dir, self.service) if is_url(self.output_dir) else RunDir(self.output_dir)


def train_worker(train_loop_config: Mapping[str, Any]) -> dict[str, Any]:
    """Entry point of every worker; `train_loop_config["spec"]` is a WorkerSpec.

    Returns: {"step": steps done, "stopped": whether a stop was asked for before the end}.
    """
    return run_worker(
        train_loop_config["spec"],
        torch.device(ray.train.torch.get_device()),
        lambda m: ray.train.report(dict(m)),
        node_is_reclaimed,
        RayMetrics,
    )


def node_is_reclaimed() -> bool:
    """Whether Ray was told that a node of this run is going away, as spot instances do."""
    # Ray 2.60's public get_preemption_info waits for all workers and the controller: too long for every step.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def run_worker(
    spec: WorkerSpec,
    device: torch.device,
    report: Any,
    reclaimed: Callable[[], bool] = lambda: False,
    metrics: Callable[[RunDir], Tracker] | None = None,
) -> dict[str, Any]:
    """The same without Ray: a process group must exist. `metrics` makes one more tracker."""
    rank, run = dist.get_rank(), spec.run_dir()
    with (
        Watchdog(run.rank_file(rank), rank, spec.config.ray.hang_timeout_s) as watchdog,
        placed(rank, lambda: watchdog.step),
    ):
        return watched(spec, run, device, report, watchdog, reclaimed, metrics)


def watched(
    spec: WorkerSpec,
    run: RunDir,
    device: torch.device,
    report: Any,
    watchdog: Watchdog,
    reclaimed: Callable[[], bool],
    metrics: Callable[[RunDir], Tracker] | None = None,
) -> dict[str, Any]:
    """The same under a watchdog that is told of each phase."""
    config, rank = spec.config, dist.get_rank()
    torch.manual_seed(config.seed + rank)
    take_over(run)
    watchdog.enter("fetching the base model")
    base = fetch_base(config, run, rank)
    begin_phase("loading", run, rank, watchdog)
    precision = base_precision(config, device)
    if device.type == "cuda":
        configure_cuda(precision.compute, config.tf32)
        hold_to_share(config.ray.resources_per_worker.get("GPU", 1.0))
    began_s = time.monotonic()
    trainee, targets = make_trainee(config, base, device, precision)
    seconds = {"load_s": time.monotonic() - began_s}
    if device.type == "cuda":
        begin_phase("compiling", run, rank, watchdog)
        began_s = time.monotonic()
        compile_kernels(trainee, config.micro_batch_size, config.sequence_len)
        torch.cuda.synchronize()
        seconds["compile_s"] = time.monotonic() - began_s
    begin_phase("self-test", run, rank, watchdog)
    began_s = time.monotonic()
    self_test(trainee.model, targets, device, precision.compute)
    seconds["self_test_s"] = time.monotonic() - began_s
    if rank == 0:
        missing = missing_kernels(device)
        notices = [missing] if missing is not None else []
        layout = trainee.parallel.layout
        facts = {"model": count_parameters(trainee.model), "start": seconds, "notices": notices}
        facts["failures"] = run.read_failures()  # of workers before these
        facts["mesh"] = {"replicate": layout.replicate, "shard": layout.shard}
        run.update_run({**facts, "world_size": dist.get_world_size()})

    state = TrainState()
    folder = choose_checkpoint(config.resume_from_checkpoint, run)
    if folder is not None:
        state = load_checkpoint(folder, trainee.parameters, trainee.optimizer)
    repair = repairer(spec.plan, config.data, hub.reference(config))
    with tracked(config, spec.plan, run, state.step, rank, metrics) as ending:
        asked = config.ray.num_workers
        split_over = asked[1] if isinstance(asked, tuple) else None
        trainer = Trainer(
            *(trainee, config.train, spec.plan, run, report, state, repair, watchdog),
            split_over=split_over,
            reclaimed=reclaimed,
            top_tokens_per_s=top_speed(config, base, device),
            pause_after=spec.pause_after,
        )
        if isinstance(config.gradient_checkpointing, str) and device.type == "cuda":
            kept = trainer.update.keep_activations(config.sequence_len)
            if rank == 0:
                found = {"kept_activations": kept.on_gpu, "offloaded_activations": kept.on_host}
                run.update_run(found)
        if state.step == 0:
            complete_prompts(trainer, config, base, "before", 0)
        finished = trainer.run()
        if finished:
            finish(trainer, config, base, targets)
        ending.outcome = "finished" if finished else "stopped"
    trainer.write_progress("done", now=True)
    report({"step": state.step, "eval_loss": trainer.eval_loss, "stopped": not finished})
    return {"step": state.step, "stopped": not finished}


def top_speed(config: Config, base: str, device: torch.device) -> float | None:
    """Tokens a second of all workers, if products ran as fast as their GPU's data sheet says; None where that
    is not known."""
    gpu = seen_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    return dist.get_world_size() * gpu.tflops * 1e12 / flop_per_token(config, read_shape(base))


def begin_phase(phase: str, run: RunDir, rank: int, watchdog: Watchdog) -> None:
    """Tell the watchdog, and as rank 0 the driver, of a phase before training."""
    _log.info(phase)
    watchdog.enter(phase)
    if rank == 0:
        run.write_progress({"phase": phase})


@dataclass
class Ending:
    """How training ended, as far as it is known."""

    outcome: str = "failed"


@contextlib.contextmanager
def tracked(
    config: Config,
    plan: DataPlan,
    run: RunDir,
    step: int,
    rank: int,
    metrics: Callable[[RunDir], Tracker] | None,
) -> Iterator[Ending]:
    """Rank 0 puts metrics.jsonl back to `step`, and tells trackers of what is appended from here on."""
    ending = Ending()
    if rank != 0:
        yield ending
        return
    run.truncate_metrics(step)
    with run.keeping_tracker_files():
        trackers = open_trackers(config, plan, run, step, [metrics(run)] if metrics is not None else [])
        run.listen(trackers)
        try:
            yield ending
        finally:
            trackers.close(ending.outcome)


def finish(trainer: Trainer, config: Config, base: str, targets: LoraTargets | None) -> None:
    """Write the result of a run that came to its end: the best weights where they are asked for."""
    best, step = trainer.best, trainer.state.step
    if config.load_best_model_at_end and best.step not in (None, step):
        step = best.step
        trainer.watchdog.enter("loading", step)
        load_weights(trainer.run_dir.checkpoint_place(step), trainer.trainee.parameters)
    complete_prompts(trainer, config, base, "after", step)
    trainer.write_progress("exporting", now=True)
    first = trainer.rank == 0
    export(trainer.trainee, config, base, targets, trainer.run_dir, write=first)
    if first:
        facts = {"exported_step": step, "best": best.facts(), "stopped_early": trainer.stopped_early}
        trainer.run_dir.update_run(facts)


def configure_cuda(compute: torch.dtype, tf32: bool) -> None:
    """How float32 products are taken; to be called before the first Triton kernel is compiled."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    # Triton's dots take float32 inputs as TF32 unless they are told not to. In a bf16 model the scan's states
    # are such inputs, and TF32 is finer than what they are made of.
    if compute == torch.float32 and not tf32:
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def hold_to_share(share: float) -> None:
    """Where workers share a GPU, let this process take no more than `share` of its memory."""
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)


def base_precision(config: Config, device: torch.device) -> Precision:
    """Frozen weights are held as they compute: bf16 on a GPU, float32 on a CPU, unless `bf16` says otherwise.
    Where every weight trains, the weights are float32 masters and only the computation is bf16."""
    bf16 = device.type == "cuda" if config.bf16 == "auto" else config.bf16
    compute = torch.bfloat16 if bf16 else torch.float32
    return Precision(
        weights=compute if config.adapter else torch.float32,
        compute=compute,
        linears_4bit=config.load_in_4bit,
        experts_4bit=config.quantize_moe_experts,
    )


def fetch_base(config: Config, run: RunDir, rank: int) -> str:
    """The base model's folder on this node, downloaded where it is named by a hub id."""

    def say(text: str) -> None:
        if rank == 0:
            run.write_progress({"phase": text})

    return str(hub.local_folder(hub.reference(config), weights=not config.reinit_weights, say=say))


def make_trainee(
    config: Config, base: str, device: torch.device, precision: Precision
) -> tuple[Trainee, LoraTargets | None]:
    """Build on meta, lay out over the workers, fill; then the optimizer over what trains."""
    model_config = read_model_config(base)
    model, targets = build(model_config, config.adapter_config, precision, device)
    bind_loss(model)
    layout, factors_whole = choose_layout(config, base, device)
    asked = config.gradient_checkpointing  # auto: on a GPU all of them, until it is known what fits
    recompute = device.type == "cuda" if isinstance(asked, str) else asked
    parallel = parallelize(model, layout, device, recompute, factors_whole)
    source = None if config.reinit_weights else base
    fill(model, source, seed=config.seed, device=device, adapter_seed=config.seed)
    parallel.hold_weights()
    if config.adapter and config.lora_model_dir:
        load_adapter(model, config.adapter_config, config.lora_model_dir)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config.train, dist.get_rank(), dist.get_world_size())
    return Trainee(model.train(), parameters, optimizer, parallel, device), targets


def choose_layout(config: Config, base: str, device: torch.device) -> tuple[Layout, bool]:
    """The layout that is asked for; else on GPUs the one that fits, and on CPUs everything sharded. And
    whether each worker holds all that an adapter trains.

    Called on every worker together: all choose by the GPU that has the least memory.
    """
    world_size, asked = dist.get_world_size(), (config.dp_shard_size, config.dp_replicate_size)
    if device.type != "cuda":
        return Layout.choose(world_size, *asked), True
    total = torch.cuda.mem_get_info(device)[1] * torch.cuda.get_per_process_memory_fraction()
    least = torch.tensor(int(total), dtype=torch.int64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    shape, room = read_shape(base), FULL * int(least)

    def estimate(shard: int) -> Memory:
        return estimate_memory(config, shape, shard, use_gpu=True, room_bytes=room)

    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    layout = Layout.choose(world_size, *asked, node_size, lambda shard: estimate(shard).peak <= room)
    return layout, estimate(layout.shard).factors_whole


def complete_prompts(trainer: Trainer, config: Config, base: str, stage: str, step: int) -> None:
    """Complete the config's prompts greedily, with the weights of `step`, into completions.jsonl; all workers
    compute, rank 0 writes."""
    if not config.completion_prompts or any(
        row["stage"] == stage and row["step"] == step for row in trainer.run_dir.read_completions()
    ):
        return
    trainer.write_progress("completing", now=True)
    tokenizer = read_tokenizer(base)
    model, eos = trainer.trainee.model.eval(), frozenset({tokenizer.eos_token_id})
    for prompt in config.completion_prompts:
        ids = prompt_ids(tokenizer, prompt, config)
        new_ids = list(generate_tokens(model, ids, config.completion_max_new_tokens, eos))
        if trainer.rank == 0:
            row = {"prompt": prompt, "completion": tokenizer.decode(new_ids), "stage": stage}
            trainer.run_dir.append_completion({**row, "step": step})
    model.train()


def prompt_ids(tokenizer: Any, prompt: str, config: Config) -> list[int]:
    """A user's prompt by the chat template and arguments that are trained with, as token ids."""
    own = config.chat_template != TOKENIZER_DEFAULT
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=Path(config.chat_template).read_text(encoding="utf-8") if own else None,
        add_generation_prompt=True,
        return_dict=False,
        **config.chat_template_kwargs,
    )
    return ids


def export(
    trainee: Trainee,
    config: Config,
    base: str,
    targets: LoraTargets | None,
    run: RunDir,
    write: bool,
) -> None:
    """Write adapter/ or model/, whole or not at all."""
    final = run.model_dir if targets is None else run.adapter_dir
    partial = run.result_aside(final)
    template = config.chat_template
    saved = SavedBase(
        folder=base,
        name=config.base_model,
        revision=config.revision_of_model if hub.is_reference(hub.reference(config)) else None,
        chat_template=None if template == TOKENIZER_DEFAULT else template,
    )
    if targets is None:
        model = trainee.model
        save_model(model, model.config, saved, partial, torch.bfloat16, write)
    else:
        save_adapter(trainee.model, config.adapter_config, targets, saved, partial, write)
    if write:
        run.publish_result(final)
