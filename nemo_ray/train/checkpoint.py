"""Training checkpoints: what trains, its optimizer state, and where the run was, in one folder.

Written with torch.distributed.checkpoint, so that it can be read on another number of workers. The frozen
base is not in it. A folder is complete if and only if it holds state.json; it gets its name last.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from nemo_ray.errors import CheckpointError
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import publish_folder, publish_json, read_json, remove_tree
from nemo_ray.train.best import steps_to_delete
from nemo_ray.train.optim import AdamW, AdamW8bit

FULL_DISK_BYTES = 16 * 2**20
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


def save_checkpoint(
    run: RunDir,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    state: TrainState,
    keep: int | None,
    best: int | None = None,
) -> None:
    """Write `checkpoints/step-N`; every rank calls it. Rank 0 then deletes the oldest beyond `keep`, but
    never that of step `best`.

    Raises: CheckpointError where the disk does not take it.
    """
    final = run.checkpoint_dir(state.step)
    if (final / "state.json").exists():
        return
    partial = final.with_name(f".{final.name}.partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    tensors = _tensors(parameters, optimizer)
    tensors[f"rng/{dist.get_rank()}"] = torch.get_rng_state()
    try:
        dcp.save(tensors, checkpoint_id=partial)
        if first:
            run.flush_metrics()  # a run that goes on from here sends no row up to this step again
            publish_json(partial / "state.json", asdict(state))
            publish_folder(partial, final)
            if keep is not None:
                for step in steps_to_delete(run.checkpoint_steps(), keep, best):
                    remove_tree(run.checkpoint_dir(step))
    except (OSError, dcp.api.CheckpointException) as error:
        cause = _cause(error)
        free_bytes = shutil.disk_usage(partial.parent).free
        if free_bytes < FULL_DISK_BYTES:  # torch's writer says something about positions then
            cause = f"the disk is full ({free_bytes / 2**20:.1f} MiB free)"
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {cause}") from None
    dist.barrier()


def load_weights(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read what trains, without the optimizer, from a checkpoint of this run; every rank calls it."""
    dcp.load({name: parameter.detach() for name, parameter in parameters.items()}, checkpoint_id=folder)


def load_checkpoint(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> TrainState:
    """Read a complete checkpoint into parameters and optimizer, whatever the sharding; every rank calls it.

    Raises: CheckpointError where it is not complete, or of another adapter.
    """
    try:
        state = TrainState(**read_json(folder / "state.json"))
    except FileNotFoundError:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} is no complete checkpoint (no state.json)"
        ) from None
    optimizer.start_states()
    tensors = _tensors(parameters, optimizer)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    _check_same(folder, tensors, saved)
    rng = f"rng/{dist.get_rank()}"
    if rng in saved:
        tensors[rng] = torch.get_rng_state()
    dcp.load(tensors, checkpoint_id=folder)
    if rng in saved:
        torch.set_rng_state(tensors[rng])
    optimizer.put_states({name.removeprefix(_OPTIMIZER): tensors[name] for name in tensors})
    return state


def _check_same(folder: Path, wanted: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> None:
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
