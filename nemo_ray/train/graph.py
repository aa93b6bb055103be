"""Forward and backward passes recorded as CUDA graphs: a replay costs the host one launch, not thousands.

A graph fixes every shape and address. So batches are copied into tensors of its own, gradients stay where
they are from step to step, and the documents of a batch, whose number and lengths differ, are told to the
attention kernel in sizes rounded up to powers of two: there is one graph for each pair of sizes that comes
up, all in one memory pool. Between replays nothing in it is needed: evaluation borrows it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nemo_ray.errors import PatchError
from nemo_ray.model.batch import PackedBatch
from nemo_ray.train.micro_batch import MicroBatch

Run = Callable[[], None]


class CudaRecorder:
    """Turns what runs on a GPU into its replay; what it makes shares one pool of memory."""

    def __init__(self) -> None:
        self._pool: torch.cuda.MemPool | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Run) -> Run:
        """Record `run`, which is called twice at the first time: kernels and handles that are made at a first
        call must be there before recording. Recording itself computes nothing.

        Raises: PatchError where something in it cannot be recorded.
        """
        if self._pool is None:
            self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream()
            torch.cuda.empty_cache()  # what one stream has freed is of no use to another
            with _on(self._stream):
                run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool.id, stream=self._stream):
                run()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PatchError(
                f"the step cannot be recorded as a CUDA graph ({error}); set cuda_graphs: false"
            ) from error
        return graph.replay

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """What runs inside takes its memory from the pool, where there is one: nothing made there may be kept
        beyond the next replay."""
        if self._pool is None or self._stream is None:
            yield
            return
        # The pool's memory is that of one stream. Only the calling thread takes it: no backward pass does.
        with _on(self._stream), torch.cuda.use_mem_pool(self._pool):
            yield


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Runs on `stream`, after what the current one has to do and before what follows there."""
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


@dataclass(frozen=True)
class Sizes:
    """What of a batch is fixed in a graph beside its shape."""

    num_sequences: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: PackedBatch) -> "Sizes":
        """The sizes of `batch`, rounded up; no sequence is longer than a pack."""
        longest = min(_power_of_two(batch.max_seqlen), batch.input_ids.shape[1])
        return cls(_power_of_two(batch.cu_seqlens.numel() - 1), longest)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class GraphedPasses:
    """Forward and backward passes of micro-batches of one shape; gradients add up in the parameters."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        record: Callable[[Run], Run],
    ) -> None:
        self.model, self.parameters, self.device, self._record = model, parameters, device, record
        self._inputs: dict[str, torch.Tensor] = {}
        self._scale = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), device=device)
        self._replays: dict[Sizes, Run] = {}
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, micro: MicroBatch, scale: float) -> None:
        """Add `scale` times a micro-batch's gradients to the parameters', and its loss to the sum.

        Args:
            micro: on the CPU.
        """
        sizes = Sizes.of(micro.batch)
        static = self._put(micro, sizes)
        self._scale.fill_(scale)
        if sizes not in self._replays:
            first = not self._replays
            self._replays[sizes] = self._record(lambda: self._pass(static))
            if first:  # what warmed up counts for nothing, and nothing else has been added yet
                self.zero_gradients()
                self._loss_sum.zero_()
        self._replays[sizes]()

    def _put(self, micro: MicroBatch, sizes: Sizes) -> MicroBatch:
        """Copy a micro-batch to where the graphs of these sizes read it."""
        batch = micro.batch
        # Sequences that there are not have no tokens: they start where the last one ends.
        starts = torch.full((sizes.num_sequences + 1,), batch.input_ids.numel(), dtype=torch.int32)
        starts[: batch.cu_seqlens.numel()] = batch.cu_seqlens
        static = PackedBatch(
            self._static("input_ids", batch.input_ids),
            self._static("seq_idx", batch.seq_idx),
            self._static(f"cu_seqlens of {sizes.num_sequences}", starts),
            sizes.max_seqlen,
        )
        return MicroBatch(static, self._static("targets", micro.targets))

    def _static(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The tensor that the graphs read as `name`, with these values."""
        if name not in self._inputs:
            self._inputs[name] = torch.empty_like(values, device=self.device)
        if self.device.type == "cuda":
            values = values.pin_memory()  # or the copy would wait for the GPU
        return self._inputs[name].copy_(values, non_blocking=True)

    def _pass(self, micro: MicroBatch) -> None:
        loss = -self.model.target_log_probs(micro.batch, micro.targets).sum()
        (loss * self._scale).backward()
        self._loss_sum += loss.detach()

    def zero_gradients(self) -> None:
        """To zero, where they are."""
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])

    def take_loss_sum(self) -> torch.Tensor:
        """The sum of the losses since the last call."""
        taken = self._loss_sum.clone()
        self._loss_sum.zero_()
        return taken
