"""How the workers of a start begin: they take over from earlier ones, and choose where to go on from."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from nemo_ray.errors import CheckpointError
from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint_files import damage

T = TypeVar("T")


def take_over(run: RunDir) -> None:
    """Begin a new attempt together: what workers of earlier starts still do is not published any more."""
    run.attempt = _from_rank_0(run.begin_attempt() if dist.get_rank() == 0 else None)


def choose_checkpoint(wanted: str | None, run: RunDir) -> Path | None:
    """The newest intact checkpoint of this run, else the one asked for; every rank calls it, and all get one.

    A damaged one is set aside, and the user is told. `wanted`: a path, "auto" or None.
    Raises: CheckpointError where the one that `wanted` names is damaged.
    """
    named = Path(wanted) if wanted is not None and wanted != "auto" else None
    while True:
        folder = _from_rank_0(run.newest_checkpoint() if dist.get_rank() == 0 else None)
        if folder is None:
            folder = named
        if folder is None:
            return None
        problem = _damage(folder)
        if problem is None:
            return folder
        if named is not None and folder.resolve() == named.resolve():
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} is damaged: {problem}; name an earlier one, or auto"
            )
        if dist.get_rank() == 0:
            aside = f"{folder.name}.damaged-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            folder.rename(folder.with_name(aside))
            newest = run.newest_checkpoint() or named
            on = f"going on from {newest.name}" if newest is not None else "starting at the beginning"
            notices = run.read_run().get("notices", [])
            notice = f"checkpoint {folder.name} is damaged: {problem}; {on} ({aside} is kept)"
            run.update_run({"notices": [*notices, notice]})
        dist.barrier()


def _damage(folder: Path) -> str | None:
    """What any of the workers found in its share of the files."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage(folder, dist.get_rank(), dist.get_world_size()))
    return next((problem for problem in found if problem is not None), None)


def _from_rank_0(value: T | None) -> T | None:
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]
