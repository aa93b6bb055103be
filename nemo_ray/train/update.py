"""One optimizer step on one worker: forward and backward passes over its packs, clipping, AdamW.

The loss of a step is the sum of its token losses divided by its number of target tokens, counted over all
workers and micro-batches before the first forward pass. So how a step is split never changes its result.

A step whose loss or gradient norm is not finite changes no weight and no state of the optimizer. Every worker
finds the same, for both figures are of all of them. It is decided on the device: nothing here waits for a
GPU, but for AdamW8bit.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.packing import Pack
from nemo_ray.model.balance import max_violation
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.lora import lora_parameters
from nemo_ray.train.activations import Kept, keep_what_fits
from nemo_ray.train.graph import CudaRecorder, GraphedPasses
from nemo_ray.train.micro_batch import MicroBatch
from nemo_ray.train.offload import HostActivations
from nemo_ray.train.optim import AdamW, AdamW8bit, clip_gradients
from nemo_ray.train.parallelize import Parallel


@dataclass(frozen=True)
class Trainee:
    """What is trained, and with what; the base inside `model` may be shared by several of these one day."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW | AdamW8bit
    parallel: Parallel
    device: torch.device


def blank_loss(trainee: Trainee, num_packs: int, sequence_len: int) -> Callable[[], torch.Tensor]:
    """The loss of a micro-batch of that size, without meaning; each pack is one document."""
    tokens = torch.zeros((num_packs, sequence_len), dtype=torch.int64, device=trainee.device)
    batch = PackedBatch.from_lengths(tokens, [[sequence_len]] * num_packs)
    return lambda: trainee.model.target_log_probs(batch, tokens).sum()


def compile_kernels(trainee: Trainee, num_packs: int, sequence_len: int) -> None:
    """A forward and a backward pass over a micro-batch of that size: a minute, once a machine.

    Kernels are compiled, and those of mamba-ssm choose, once for all sizes, what is fastest at the first one:
    so that must be the size that will train.
    """
    trainee.model.train()
    blank_loss(trainee, num_packs, sequence_len)().backward()
    trainee.model.zero_grad(set_to_none=True)


def recordable(trainee: Trainee) -> bool:
    """Whether a step can be a CUDA graph.

    FSDP2's hooks talk to other workers; what is drawn at random must be drawn again when recomputed; and
    recording was measured with LoRA factors alone: embeddings, or every weight, train as they are.
    """
    factors_alone = len(lora_parameters(trainee.model)) == len(trainee.parameters)
    return factors_alone and not trainee.parallel.sharded and not trainee.model.draws_numbers


class Update:
    """The steps of one `Trainee`, whose packs are all of one length."""

    def __init__(
        self, trainee: Trainee, train: TrainSection, before_change: Callable[[], None] = lambda: None
    ) -> None:
        """`before_change` is called before the optimizer changes a weight or a state of its own."""
        self.trainee, self.train, self._before_change = trainee, train, before_change
        trainee.parallel.hold_gradients(trainee.parameters.values())
        self.graphs: GraphedPasses | None = None
        self._recorder: CudaRecorder | None = None
        if train.cuda_graphs and trainee.device.type == "cuda" and recordable(trainee):
            self._recorder = CudaRecorder()
            self.graphs = GraphedPasses(trainee.model, trainee.parameters, trainee.device, self._recorder)

    def keep_activations(self, sequence_len: int) -> Kept:
        """Let as many blocks keep their activations as fit beside packs of `sequence_len` tokens, and others
        on the host: but not of what FSDP2 shards."""
        if not self.trainee.optimizer.started:
            self.trainee.optimizer.start_states()
        loss = blank_loss(self.trainee, self.train.micro_batch_size, sequence_len)
        model, device = self.trainee.model.train(), self.trainee.device
        moving = None if self.trainee.parallel.sharded else HostActivations(model, device)
        # How many passes that takes is a matter of memory and speed: they change no random number after them.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            kept = keep_what_fits(model, device, loss, moving, self.trainee.parallel.untracked_bytes)
        self._zero_gradients()
        max_violation(model)  # of these passes, on tokens without meaning
        return kept

    def between_steps(self) -> AbstractContextManager[None]:
        """For forward passes without gradients: they take the memory that a step holds, if it is recorded."""
        return contextlib.nullcontext() if self._recorder is None else self._recorder.lent()

    def __call__(
        self, packs: Sequence[Pack], num_targets: int, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward and AdamW over this rank's packs, at the learning rate `rate`; AdamW is left out
        where a figure that is returned is not finite.

        Args:
            num_targets: target tokens of the step, over all workers.

        Returns: loss sum and gradient norm before clipping, both over all workers and on the device.
        """
        trainee = self.trainee
        loss_sum = self._passes(packs, trainee.parallel.loss_scale / max(1, num_targets))
        trainee.parallel.sum_over_workers(loss_sum)
        trainee.parallel.sync_gradients()
        grad_norm = clip_gradients(list(trainee.parameters.values()), self.train.max_grad_norm)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        finite = torch.isfinite(loss_sum) & torch.isfinite(grad_norm)
        self._before_change()
        trainee.optimizer.step_unless((~finite).float())
        self._zero_gradients()
        return loss_sum, grad_norm

    def _passes(self, packs: Sequence[Pack], scale: float) -> torch.Tensor:
        """Gradients of `scale` times the loss sum over `packs`; returns the loss sum."""
        trainee, size = self.trainee, self.train.micro_batch_size
        starts = range(0, len(packs), size)
        if self.graphs is not None:
            for start in starts:
                self.graphs(MicroBatch.collate(packs[start : start + size], torch.device("cpu")), scale)
            return self.graphs.take_loss_sum()
        loss_sum = torch.zeros((), device=trainee.device)
        for start in starts:
            micro = MicroBatch.collate(packs[start : start + size], trainee.device)
            trainee.parallel.set_last_micro_batch(start == starts[-1])
            loss = -trainee.model.target_log_probs(micro.batch, micro.targets).sum()
            (loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _zero_gradients(self) -> None:
        if self.graphs is not None or self.trainee.parallel.sums_gradients:  # they stay where they are
            torch._foreach_zero_([parameter.grad for parameter in self.trainee.parameters.values()])
        else:
            self.trainee.optimizer.zero_grad(set_to_none=True)
