"""Forward and backward passes recorded as CUDA graphs: a replay costs the host one launch, not thousands.

A graph fixes every shape and address. So batches are copied into tensors of its own, gradients stay where
they are from step to step, and the documents of a batch, whose number and lengths differ, are told to the
attention kernel in sizes rounded up to powers of two: there is one graph for each pair of sizes that comes
up, all in one memory pool.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nemo_ray.errors import PatchError
from nemo_ray.model.batch import PackedBatch
from nemo_ray.train.micro_batch import MicroBatch


@dataclass(frozen=True)
class _Sizes:
    """What of a batch is fixed in a graph beside its shape."""

    num_sequences: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: PackedBatch) -> "_Sizes":
        """The sizes of `batch`, rounded up; no sequence is longer than a pack."""
        longest = min(_power_of_two(batch.max_seqlen), batch.input_ids.shape[1])
        return cls(_power_of_two(batch.cu_seqlens.numel() - 1), longest)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class GraphedPasses:
    """Forward and backward passes of micro-batches of one shape; gradients add up in the parameters."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        device = next(iter(parameters.values())).device
        self._inputs: dict[str, torch.Tensor] = {}
        self._scale = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), device=device)
        self._graphs: dict[_Sizes, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, micro: MicroBatch, scale: float) -> None:
        """Add `scale` times a micro-batch's gradients to the parameters', and its loss to the sum.

        Args:
            micro: on the CPU.

        Raises: PatchError where a pass cannot be recorded.
        """
        sizes = _Sizes.of(micro.batch)
        # Sequences that there are not have no tokens: they start where the last one ends.
        starts = torch.full((sizes.num_sequences + 1,), micro.targets.numel(), dtype=torch.int32)
        starts[: micro.batch.cu_seqlens.numel()] = micro.batch.cu_seqlens
        static = MicroBatch(
            PackedBatch(
                self._static("input_ids", micro.batch.input_ids),
                self._static("seq_idx", micro.batch.seq_idx),
                self._static(f"cu_seqlens of {sizes.num_sequences}", starts),
                sizes.max_seqlen,
            ),
            self._static("targets", micro.targets),
        )
        self._scale.fill_(scale)
        if sizes not in self._graphs:
            self._graphs[sizes] = self._record(static)
        self._graphs[sizes].replay()

    def _static(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The tensor that the graphs read as `name`, with these values."""
        if name not in self._inputs:
            self._inputs[name] = torch.empty_like(values, device=self._scale.device)
        return self._inputs[name].copy_(values.pin_memory(), non_blocking=True)

    def _pass(self, micro: MicroBatch) -> None:
        loss = -self.model.target_log_probs(micro.batch, micro.targets).sum()
        (loss * self._scale).backward()
        self._loss_sum += loss.detach()

    def _record(self, micro: MicroBatch) -> torch.cuda.CUDAGraph:
        if not self._graphs:
            self._run_once(micro)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._pass(micro)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PatchError(
                f"the step cannot be recorded as a CUDA graph ({error}); set cuda_graphs: false"
            ) from error
        return graph

    def _run_once(self, micro: MicroBatch) -> None:
        """Whatever is made at a first call (kernels, handles) must be there before recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._pass(micro)
        torch.cuda.current_stream().wait_stream(side)
        self.zero_gradients()
        self._loss_sum.zero_()

    def zero_gradients(self) -> None:
        """To zero, where they are."""
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])

    def take_loss_sum(self) -> torch.Tensor:
        """The sum of the losses since the last call."""
        taken = self._loss_sum.clone()
        self._loss_sum.zero_()
        return taken
