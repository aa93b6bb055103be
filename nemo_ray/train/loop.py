"""The run on one worker: read, step, log, evaluate, save. Knows no Ray; it is handed `report`.

What a step computes is update.py's; here are its order, its inputs and what is told of it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.reader import PackReader, Repair, StepPacks
from nemo_ray.errors import DataError, ReclaimedError
from nemo_ray.model.balance import max_violation
from nemo_ray.run_dir import RunDir
from nemo_ray.train.best import EVAL_LOSS, Best, best_of
from nemo_ray.train.checkpoint import Checkpointer, TrainState
from nemo_ray.train.evaluation import Evaluator
from nemo_ray.train.metrics import FiguresOnTheWay, extend_hash, passed_multiple, peak_memory_bytes
from nemo_ray.train.nonfinite import NonFiniteSteps, or_none
from nemo_ray.train.optim import learning_rate
from nemo_ray.train.profiling import StepProfiler
from nemo_ray.train.update import Trainee, Update
from nemo_ray.train.watchdog import Watchdog

Report = Callable[[Mapping[str, Any]], None]
PROGRESS_INTERVAL_S = 0.2
_log = logging.getLogger(__name__)
# Of a row of metrics.jsonl, in this order.
TRAIN_FIELDS = ("step", "epoch", "cursor", "loss", "lr", "grad_norm", "tokens", "target_tokens")
TRAIN_FIELDS += ("tokens_per_s", "step_s", "data_wait_s", "checkpoint_s", "peak_memory_bytes")
TRAIN_FIELDS += ("mfu", "expert_max_violation", "data_hash", "nonfinite_steps")


class Trainer:
    """One worker's part in a run of `train` over the packs of `plan`."""

    def __init__(
        self,
        trainee: Trainee,
        train: TrainSection,
        plan: DataPlan,
        run: RunDir,
        report: Report,
        state: TrainState,
        repair: Repair,
        watchdog: Watchdog,
        split_over: int | None = None,
        reclaimed: Callable[[], bool] = lambda: False,
        top_tokens_per_s: float | None = None,
        pause_after: int | None = None,
    ) -> None:
        """`split_over`: the number of workers that micro_batch_size and gradient_accumulation_steps are meant
        for, where there may be fewer now. `reclaimed`: whether a node of the run is being taken back.
        `top_tokens_per_s`: of all workers, if products ran as fast as the data sheet says. `pause_after`: an
        evaluation, counted from 1; a run that is not at its end there stops as if it were asked to."""
        self.pause_after, self._evaluations = pause_after, 0  # not counting that before the first step
        self.reclaimed, self.top_tokens_per_s = reclaimed, top_tokens_per_s
        self.trainee, self.train, self.plan, self.run_dir, self.report = trainee, train, plan, run, report
        self.state, self.repair, self.watchdog = state, repair, watchdog
        self.checkpointer = Checkpointer(run, trainee.parameters, trainee.optimizer, train.save_total_limit)
        self.update = Update(trainee, train, before_change=self.checkpointer.hold_changes)
        self.evaluator = Evaluator(trainee, plan, train.micro_batch_size, watchdog, repair)
        self.best = Best(train)
        self.stopped_early: dict[str, int] | None = None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        per_worker = train.micro_batch_size * train.gradient_accumulation_steps
        self._packs_per_step = (split_over or self.world_size) * per_worker
        self.eval_loss: float | None = None
        self.started_s = time.monotonic()
        self.started_progress = self._progress(state.epoch, state.step)
        self._progress_written_s = 0.0
        self._saved_step = state.step if state.step else -1
        self._held_by_checkpoints_s = 0.0  # since the last row
        self._evaluated_step = -1
        self.nonfinite = NonFiniteSteps(train, plan, run, self.rank, self.world_size)
        self.profiler = StepProfiler(train, run, trainee.device, self.rank)
        self._unlogged: tuple[dict[str, Any], FiguresOnTheWay, StepPacks] | None = None
        self._step_ended_s = time.monotonic()
        max_violation(trainee.model)  # of passes before training, on tokens without meaning

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the end, or until somebody asks for a stop; returns whether the end was reached."""
        self._remember_evaluations()
        if self.state.step == 0 and self._evaluated_step != 0:
            self.evaluate()
        reader = PackReader(
            self.plan,
            seed=self.train.seed,
            num_epochs=math.inf if self.train.max_steps else self.train.num_epochs,
            rank=self.rank,
            world_size=self.world_size,
            packs_per_step=self._packs_per_step,
            packs_per_rank=self._packs_per_rank(),
            place=self.state.place,
            repair=self.repair,
        )
        finished = True
        # The first evaluation is no measure of the steps' pace.
        self.started_s = self._step_ended_s = time.monotonic()
        while not (self.train.max_steps and self.state.step >= self.train.max_steps):
            if self.best.patience_is_over and self._progress(self.state.epoch, self.state.step) < 1.0:
                misses = self.best.misses
                self.stopped_early = {"step": self.state.step, "evaluations_without_improvement": misses}
                break
            if self._pause_is_due():
                finished = False
                break
            self.watchdog.enter("training", self.state.step)
            self.watchdog.wait()
            packs = reader.next_step()
            if packs is None:
                break
            if not self.step(packs):
                finished = False
                break
        self._log_last()
        self.profiler.end(self.state.step)
        if finished and self._evaluated_step != self.state.step:
            self.evaluate()
        self._save_and_wait()
        return finished

    def step(self, packs: StepPacks) -> bool:
        """One optimizer step, and what is due after it; False where a stop was asked for and nothing done."""
        before = self._progress(self.state.epoch, self.state.step)
        after = self._progress(packs.epoch, self.state.step + 1)
        num_targets, num_tokens, stop, reclaimed = self._sum_over_workers(
            sum(pack.num_targets for pack in packs.packs),
            sum(pack.num_tokens for pack in packs.packs),
            int(self.rank == 0 and self.run_dir.stop_requested()),
            int(self.reclaimed()),
        )
        if stop:
            return False
        if reclaimed:
            self._leave()
        self.checkpointer.check()
        self.watchdog.work()
        rate = learning_rate(self.train, self.state.step, before, after)
        if self.profiler.begins_with(self.state.step + 1):
            self._log_last()
            self.profiler.begin()
        loss_sum, grad_norm = self.update(packs.packs, num_targets, rate)
        self.state.step += 1
        self.state.cursor, self.state.place, self.state.epoch = packs.cursor, packs.place, packs.epoch
        self.state.data_hash = extend_hash(self.state.data_hash, packs.drawn)
        row = dict.fromkeys(TRAIN_FIELDS) | {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "cursor": self.state.cursor,
            "lr": rate,
            "tokens": num_tokens,
            "target_tokens": num_targets,
            "data_wait_s": packs.wait_s,
            "checkpoint_s": self._held_by_checkpoints_s,
            "data_hash": self.state.data_hash,
        }
        self._held_by_checkpoints_s = 0.0
        violation = max_violation(self.trainee.model)
        others = [] if violation is None else [violation]
        figures = FiguresOnTheWay(loss_sum / max(1, num_targets), grad_norm, *others)
        self._log_last()  # the step before: a GPU is at work on this one meanwhile
        self._unlogged = (row, figures, packs)
        if figures.are_here or self.nonfinite.next_may_end_the_run:
            self._log_last()
        evaluate = self._due(self.train.eval_steps, self.train.evals_per_epoch, before, after)
        save = self._due(self.train.save_steps, self.train.saves_per_epoch, before, after)
        if evaluate or save:
            self._log_last()
            if evaluate:
                self.evaluate()
            if save:
                self.save()
            self._step_ended_s = time.monotonic()
        if self.profiler.ends_with(self.state.step):
            self._log_last()
            self.profiler.end(self.state.step)
            self._step_ended_s = time.monotonic()
        return True

    def evaluate(self) -> None:
        """Evaluate the held-out rows, where there are any; save the best weights so far, where asked to."""
        if not self.plan.eval_windows:
            return
        _log.info("evaluating")
        self.write_progress("evaluating", now=True)
        with self.update.between_steps():
            found = self.evaluator()
        if found is None:
            if self.train.load_best_model_at_end or self.train.early_stopping_patience:
                raise DataError(
                    "val_set_size, test_datasets: no held-out row has a target token, so there is no best "
                    "evaluation; hold out other rows, or remove load_best_model_at_end and "
                    "early_stopping_patience"
                )
            return
        row = {"step": self.state.step, **found}
        self.eval_loss = row["eval_loss"]
        self._evaluated_step = self.state.step
        if self.rank == 0:
            self.run_dir.append_metrics(row)
        self._evaluations += self.state.step > 0
        is_best = self.best.add(row)
        self.report({"step": self.state.step, "eval_loss": self.eval_loss})
        if is_best and self.train.load_best_model_at_end:
            self.save()
        self.write_progress("training", now=True)

    def save(self) -> None:
        """Begin a checkpoint of the current step, unless that exists or nothing was trained; it is written
        while training goes on."""
        if self.state.step == 0 or self._saved_step == self.state.step:
            return
        _log.info("saving")
        self.write_progress("saving", now=True)
        began_s = time.monotonic()
        self.checkpointer.start(self.state, self.best.step if self.train.load_best_model_at_end else None)
        self._held_by_checkpoints_s += time.monotonic() - began_s
        self._saved_step = self.state.step
        self.report({"step": self.state.step, "eval_loss": self.eval_loss})
        self.write_progress("training", now=True)

    def _save_and_wait(self) -> None:
        """The same, and return when it has its name."""
        self.save()
        self.write_progress("saving", now=True)
        self.checkpointer.wait()

    def _leave(self) -> None:
        """Save, and end this start of the workers: the next one goes on where there is room."""
        self._log_last()
        self._save_and_wait()
        raise ReclaimedError(
            f"a node of this run is being taken back (preempted): saved after step {self.state.step}"
        )

    # -- small parts -----------------------------------------------------------------------------

    def _remember_evaluations(self) -> None:
        """Count the evaluations up to this step that the run made before it was broken off."""
        rows = [row for row in self.run_dir.read_metrics() if EVAL_LOSS in row] if self.rank == 0 else []
        told = [rows]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        self.best = best_of(told[0], self.train, self.state.step)
        self._evaluations = sum(0 < row["step"] <= self.state.step for row in told[0])
        for row in told[0]:
            if row["step"] == self.state.step:
                self.eval_loss = row[EVAL_LOSS]
                self._evaluated_step = self.state.step

    def _pause_is_due(self) -> bool:
        due = self.pause_after is not None and self._evaluations >= self.pause_after
        return due and self._progress(self.state.epoch, self.state.step) < 1.0

    def _packs_per_rank(self) -> int:
        """Whole micro-batches for every worker, as many as the step needs."""
        micro = self.train.micro_batch_size
        return math.ceil(self._packs_per_step / (self.world_size * micro)) * micro

    def _progress(self, epoch: float, step: int) -> float:
        """Part of the run that is done, 0 to 1: by steps where max_steps is set, else by rows."""
        if self.train.max_steps:
            return min(1.0, step / self.train.max_steps)
        return min(1.0, epoch / self.train.num_epochs)

    def _due(self, every: int | None, per_epoch: int | None, before: float, after: float) -> bool:
        if every:
            return self.state.step % every == 0
        epochs = self.train.num_epochs
        return passed_multiple(before * epochs, after * epochs, per_epoch)

    def _sum_over_workers(self, *counts: int) -> list[int]:
        """Sum small integers over all workers, on the CPU: it never waits for the GPU."""
        total = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(total)
        return [int(count) for count in total]

    def _log_last(self) -> None:
        """Wait for the figures of the last step, and write its row where one is due.

        Raises: NonFiniteError where it was one too many without finite figures.
        """
        if self._unlogged is None:
            return
        row, figures, packs = self._unlogged
        self._unlogged = None
        loss, norm, *others = figures.wait()
        row["expert_max_violation"] = others[0] if others else None
        now_s = time.monotonic()
        step_s, self._step_ended_s = now_s - self._step_ended_s, now_s
        self.state.nonfinite_steps += self.nonfinite.add(row["step"], loss, norm, packs)
        if self.rank == 0 and row["step"] % self.train.logging_steps == 0:
            self._log(row | {"loss": or_none(loss), "grad_norm": or_none(norm), "step_s": step_s})
        if self.nonfinite.too_many:
            self._save_and_wait()  # of the weights before these steps, for none came between
            raise self.nonfinite.error(self.run_dir.checkpoint_place(self.state.step))

    def _log(self, row: dict[str, Any]) -> None:
        row["tokens_per_s"] = row["tokens"] / row["step_s"]
        if self.top_tokens_per_s is not None:
            row["mfu"] = row["tokens_per_s"] / self.top_tokens_per_s
        untracked_bytes = self.trainee.parallel.untracked_bytes
        row["peak_memory_bytes"] = peak_memory_bytes(self.trainee.device) + untracked_bytes
        row["nonfinite_steps"] = self.state.nonfinite_steps
        self.run_dir.append_metrics(row)
        _log.info("loss %s, %.0f tokens/s", row["loss"], row["tokens_per_s"])
        self.write_progress("training", **{name: row[name] for name in ("loss", "lr", "tokens_per_s")})

    def write_progress(self, phase: str, now: bool = False, **figures: float | None) -> None:
        """Tell the driver where the run is; often enough for an eye, seldom enough to cost nothing."""
        self.watchdog.enter(phase, self.state.step)
        clock_s = time.monotonic()
        if self.rank != 0 or (not now and clock_s - self._progress_written_s < PROGRESS_INTERVAL_S):
            return
        self._progress_written_s = clock_s
        done = self._progress(self.state.epoch, self.state.step)
        gained = done - self.started_progress
        eta_s = (clock_s - self.started_s) / gained * (1 - done) if gained > 0 else None
        self.run_dir.write_progress(
            {
                "phase": phase,
                "step": self.state.step,
                "max_steps": self.train.max_steps,
                "progress": done,
                "eta_s": eta_s,
                "eval_loss": self.eval_loss,
                **figures,
            }
        )
