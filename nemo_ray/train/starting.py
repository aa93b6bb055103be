"""How the workers of a start begin: they take over from earlier ones, and choose where to go on from."""

from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from nemo_ray.errors import CheckpointError
from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint_files import damage
from nemo_ray.urls import is_url

T = TypeVar("T")


def take_over(run: RunDir) -> None:
    """Begin a new attempt together: what workers of earlier starts still do is not published any more."""
    run.attempt = _from_rank_0(run.begin_attempt() if dist.get_rank() == 0 else None)


def choose_checkpoint(wanted: str | None, run: RunDir) -> str | None:
    """The path or URL of the newest intact checkpoint of this run, else of the one asked for.

    Every rank calls it, and all get the same. A damaged one is set aside, and the user is told.

    Args:
        wanted: a path, a URL, "auto" or None.

    Raises: CheckpointError where the one that `wanted` names is damaged.
    """
    named = wanted if wanted != "auto" else None
    while True:
        step = _from_rank_0(max(run.checkpoint_steps(), default=None) if dist.get_rank() == 0 else None)
        folder = run.checkpoint_place(step) if step is not None else named
        if folder is None:
            return None
        problem = _damage(folder)
        if problem is None:
            return folder
        if step is None or (named is not None and _same(folder, named)):
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} is damaged: {problem}; name an earlier one, or auto"
            )
        if dist.get_rank() == 0:
            aside = run.retire_checkpoint(step, "damaged")
            left = max(run.checkpoint_steps(), default=None)
            newest = f"step-{left}" if left is not None else named
            on = f"going on from {newest}" if newest is not None else "starting at the beginning"
            notices = run.read_run().get("notices", [])
            notice = f"checkpoint step-{step} is damaged: {problem}; {on} ({aside} is kept)"
            run.update_run({"notices": [*notices, notice]})
        dist.barrier()


def _same(folder: str, other: str) -> bool:
    return folder == other or (not is_url(folder) and Path(folder).resolve() == Path(other).resolve())


def _damage(folder: str) -> str | None:
    """What any of the workers found in its share of the files."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage(folder, dist.get_rank(), dist.get_world_size()))
    return next((problem for problem in found if problem is not None), None)


def _from_rank_0(value: T | None) -> T | None:
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]
