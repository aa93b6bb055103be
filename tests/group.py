"""A function in each of several processes that form one gloo group: workers without Ray."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_in_group(function: Callable[..., None], world: int, folder: Path, *args: Any, limit_s: float) -> None:
    """Call `function(rank, *args)` in `world` processes; every one must return within `limit_s`."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_member, args=(rank, world, str(folder / "group"), function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + limit_s
    for process in processes:
        process.join(timeout=max(0.0, deadline_s - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"ranks {late} had not returned after {limit_s:.0f} s"
    assert [process.exitcode for process in processes] == [0] * world


def _member(rank: int, world: int, file: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    code = 0
    try:
        function(rank, *args)
        dist.barrier()  # nobody leaves while another one still reads from it
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by Python's own end: gloo's threads (torch 2.13) may hold the last tensors, and one that frees such
    # a tensor while the interpreter ends is ended by Python 3.11, which aborts the process.
    os._exit(code)


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
