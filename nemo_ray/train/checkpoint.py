"""Training checkpoints: what trains, its optimizer state, and where the run was, in one folder.

Written while training goes on, with torch.distributed.checkpoint, so that it can be read on another number
of workers. The frozen base is not in it. A folder is complete if and only if it holds state.json; it gets its
name last. What the files are like is checkpoint_files.py's.
"""

import contextlib
import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from nemo_ray.errors import CheckpointError, NemoRayError
from nemo_ray.run_dir import STATE_NAME, RunDir
from nemo_ray.storage import join, read_json
from nemo_ray.train.best import steps_to_delete
from nemo_ray.train.checkpoint_files import Reader, Writer
from nemo_ray.train.full_disk import free_bytes
from nemo_ray.train.optim import AdamW, AdamW8bit
from nemo_ray.train.staging import HostCopies
from nemo_ray.urls import is_url

Optimizer = AdamW | AdamW8bit
_OPTIMIZER = "optimizer/"
_BY_WORKER = re.compile(rf"{_OPTIMIZER}worker\d+of(\d+)/")  # states that each worker has of its own


@dataclass
class TrainState:
    """Where a run is. Counts, not positions in files: it means the same on any number of workers."""

    step: int = 0
    cursor: int = 0  # packs consumed, in global order, over all epochs
    place: dict[str, Any] | None = None  # where the reader of packs goes on; None at the beginning
    epoch: float = 0.0  # rows consumed / rows of an epoch
    data_hash: str = ""
    nonfinite_steps: int = 0  # steps so far that changed nothing, for their loss or gradient was not finite


def _tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Names to tensors: parameters as named, the optimizer's states behind "optimizer/"."""
    state: dict[str, Any] = {name: parameter.detach() for name, parameter in parameters.items()}
    return state | {f"{_OPTIMIZER}{name}": value for name, value in optimizer.named_states().items()}


class Checkpointer:
    """Writes checkpoints of one run, one at a time, while training goes on; every rank has one.

    `start` begins to copy what is saved to the CPU, and returns; what changes it on a GPU must come after
    `hold_changes`. The rest, until the checkpoint has its name, happens in a thread with a process group of
    its own. `keep`: how many checkpoints stay.
    """

    def __init__(
        self, run: RunDir, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, keep: int | None
    ) -> None:
        self._run, self._parameters, self._optimizer, self._keep = run, parameters, optimizer, keep
        self._group = dist.new_group(backend="gloo")
        on_gpu = any(parameter.is_cuda for parameter in parameters.values())
        self._copies = HostCopies(on_gpu)
        self._on_the_way: tuple[int, Future[Any]] | None = None

    def start(self, state: TrainState, best: int | None = None) -> None:
        """Begin `checkpoints/step-N`. When it has its name, the oldest beyond `keep` are deleted, but never
        that of step `best`.

        Raises: CheckpointError where the one before failed.
        """
        self.wait()
        run, step = self._run, state.step
        if dist.get_rank() == 0:
            run.flush_metrics()  # a run that goes on from here sends no row up to this step again

        def publish(content: dict[str, Any]) -> None:
            run.publish_checkpoint(step, content)
            if self._keep is not None:
                for old in steps_to_delete(run.checkpoint_steps(), self._keep, best):
                    run.remove_checkpoint(old)

        aside, token = run.checkpoint_aside(step), run.checkpoint_token
        writer = Writer(aside, dist.get_rank(), asdict(state), self._copies.wait, publish, token)
        future = dcp.async_save(
            {**_tensors(self._parameters, self._optimizer), **_random_states()},
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._copies,
        )
        assert isinstance(future, Future)
        self._on_the_way = (step, future)

    def hold_changes(self) -> None:
        """What the current stream does from here on may change what is saved."""
        self._copies.hold_changes()

    def check(self) -> None:
        """Raises: CheckpointError where the one on its way failed."""
        if self._on_the_way is not None and self._on_the_way[1].done():
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is on its way.

        Raises: CheckpointError where it failed, SupersededError where a newer start of the run took over.
        """
        if self._on_the_way is None:
            return
        step, future = self._on_the_way
        self._on_the_way = None
        try:
            future.result()
        except (OSError, dcp.api.CheckpointException) as error:
            self._run.check_attempt()
            place, cause = self._run.checkpoint_place(step), _cause(error)
            free = None if is_url(place) else free_bytes(str(Path(place).parent))
            if free is not None:
                cause = f"the disk is full ({free / 2**20:.1f} MiB free)"
            if dist.get_rank() == 0:
                with contextlib.suppress(OSError, NemoRayError):  # the first error is the one to tell
                    self._run.discard_checkpoint(step)
            raise CheckpointError(f"{place} could not be written: {cause}") from None


def _random_states() -> dict[str, torch.Tensor]:
    """The states of this worker's generators of random numbers."""
    rank = dist.get_rank()
    states = {f"rng/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng/gpu-{rank}"] = torch.cuda.get_rng_state()
    return states


def load_weights(folder: Path | str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read what trains, without the optimizer, from a checkpoint of this run; every rank calls it."""
    _load({name: parameter.detach() for name, parameter in parameters.items()}, folder)


def load_checkpoint(
    folder: Path | str, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> TrainState:
    """Read a complete checkpoint into parameters and optimizer, whatever the sharding; every rank calls it.

    Raises: CheckpointError where it is not complete, or of another adapter.
    """
    state = read_state(folder)
    optimizer.start_states()
    tensors = _tensors(parameters, optimizer)
    saved = Reader(folder).read_metadata().state_dict_metadata
    _check_same(folder, tensors, saved)
    random_states = {name: value for name, value in _random_states().items() if name in saved}
    tensors |= random_states
    _load(tensors, folder)
    for name in random_states:
        put = torch.cuda.set_rng_state if "/gpu-" in name else torch.set_rng_state
        put(tensors[name])
    optimizer.put_states({name.removeprefix(_OPTIMIZER): tensors[name] for name in tensors})
    return state


def read_state(folder: Path | str) -> TrainState:
    """Where the run was at a checkpoint. Raises: CheckpointError where it is not complete."""
    try:
        facts = read_json(join(str(folder), STATE_NAME))
        return TrainState(**{field.name: facts[field.name] for field in fields(TrainState)})
    except FileNotFoundError:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} is no complete checkpoint (no {STATE_NAME})"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"resume_from_checkpoint: {join(str(folder), STATE_NAME)} cannot be read: {error!r}"
        ) from None


def _load(tensors: dict[str, torch.Tensor], folder: Path | str) -> None:
    try:
        dcp.load(tensors, storage_reader=Reader(folder))
    except dcp.api.CheckpointException as error:
        raise CheckpointError(_cause(error)) from None


def _check_same(folder: Path | str, wanted: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> None:
    by_worker = {name: match[1] for name in saved if (match := _BY_WORKER.match(name))}
    for count in by_worker.values():
        if int(count) != dist.get_world_size():
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} holds 8-bit optimizer states of {count} workers, and "
                f"they fit no other number (here {dist.get_world_size()}); set ray.num_workers: {count}"
            )
    for name, tensor in wanted.items():
        found = getattr(saved.get(name), "size", None)
        if found is None or tuple(found) != tuple(tensor.shape):
            has = tuple(found) if found is not None else "nothing"
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} does not fit this config: {name} is "
                f"{tuple(tensor.shape)}, the checkpoint has {has}"
            )
    others = {name for name in by_worker if f"/worker{dist.get_rank()}of" not in name}
    extra = [name for name in saved if name not in wanted.keys() | others and not name.startswith("rng/")]
    if extra:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} does not fit this config: nothing here takes its {extra[0]}"
        )


def _cause(error: BaseException) -> str:
    """The innermost message of a collective failure."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error) or type(error).__name__
