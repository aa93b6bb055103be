"""Which worker was lost, where it was and why, from what the ranks wrote (watchdog.py) and Ray's errors.

Runs in Ray Train's controller, before workers start again; is handed the look at a process. Imports no Ray.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nemo_ray.failures import first_failure, is_echo, is_lost_worker, one_line, root_cause
from nemo_ray.run_dir import RunDir
from nemo_ray.train.processes import Look
from nemo_ray.train.watchdog import RankState, read_rank

GRACE_S = 1.0
"""Ranks that hang in one step are ended by their watchdogs within moments of each other."""
LookAt = Callable[[list[RankState], bool], Mapping[int, Look]]
"""Looks at the processes of ranks, each on its node, by rank; silent ones are killed for their stack."""
_SHOWN = 3
"""Ranks that are told of in a line: a node takes all of its ranks with it."""
_NO_ANSWER = "WorkerHealthCheckTimeoutError"
# The innermost frame of faulthandler's newest call first; torch's collectives are its own files.
_WAITS_FOR_OTHERS = re.compile(r'File "[^"]*torch/distributed/')
_THREAD = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_OURS = re.compile(r'File "[^"]*train/(?:loop|update|evaluation|worker)\.py"')


@dataclass(frozen=True)
class Failure:
    """What became of the workers, in one line, and the stacks of those that hung."""

    line: str
    stacks: str = ""


def find_out(run: RunDir, errors: Mapping[int, Exception], look_at: LookAt) -> Failure:
    """Why the workers of `run` failed with `errors`, by rank. May take some seconds."""
    error = first_failure(errors)
    rank = next(rank for rank, one in errors.items() if one is error)
    if not is_lost_worker(error):
        return Failure(f"rank {rank} failed: {one_line(error)}")
    found = _read(run)
    if any(stack for _, stack in found.values()):
        time.sleep(GRACE_S)
        return _hung(_read(run))
    states = {rank: state for rank, (state, _) in found.items()}
    silent = [rank for rank, one in errors.items() if type(root_cause(one)).__name__ == _NO_ANSWER]
    if silent:
        return _silent({rank: states.get(rank) for rank in silent}, look_at)
    dead = {rank: one for rank, one in errors.items() if not is_echo(root_cause(one))}
    if not dead:  # the others heard of it first
        looks = look_at(list(states.values()), False)
        dead = {rank: error for rank, seen in looks.items() if seen.state is None}
    if not dead:
        return Failure(f"the workers lost touch with each other: {one_line(error)}")
    return Failure(_each(f"{_who(rank, states.get(rank))} {_cause(one)}" for rank, one in dead.items()))


def _read(run: RunDir) -> dict[int, tuple[RankState, str]]:
    """What each rank said last, and its stacks where it ended itself."""
    told = [read_rank(path) for path in run.ranks_dir.glob("rank-*.txt")]
    found = {state.rank: (state, stack) for state, stack in filter(None, told)}
    return dict(sorted(found.items()))


def _hung(found: Mapping[int, tuple[RankState, str]]) -> Failure:
    """Of the ranks that ended themselves those are told that did not wait in a collective for the others."""
    hung = {rank: (state, stack) for rank, (state, stack) in found.items() if stack}
    culprits = {rank: told for rank, told in hung.items() if not _waited_for_others(told[1])} or hung
    lines = [
        f"{_who(rank, state)} made no progress for {state.limit_s:g} s (ray.hang_timeout_s) and was ended"
        for rank, (state, _) in culprits.items()
    ]
    stacks = "\n".join(f"{_who(rank, state)}\n{stack}" for rank, (state, stack) in hung.items())
    return Failure(_each(lines), stacks)


def _waited_for_others(stack: str) -> bool:
    """Whether the thread that trains, in faulthandler's words, is in a collective."""
    for thread in _THREAD.split(stack):
        if _OURS.search(thread):
            frames = [line for line in thread.splitlines() if line.lstrip().startswith("File ")]
            return bool(_WAITS_FOR_OTHERS.search(frames[0]))
    return False


def _silent(ranks: Mapping[int, RankState | None], look_at: LookAt) -> Failure:
    looks = look_at([state for state in ranks.values() if state is not None], True)
    lines, stacks = [], []
    for rank, state in ranks.items():
        seen = looks.get(rank, Look("on a node that does not answer"))
        quiet_s = f" for {time.time() - state.since:.0f} s" if state is not None else ""
        what = f"is {seen.state}" if seen.state else "is gone"
        lines.append(f"{_who(rank, state)} {what} and made no progress{quiet_s}")
        if seen.stack:
            stacks.append(f"{_who(rank, state)}\n{seen.stack}")
    return Failure(_each(lines), "\n".join(stacks))


def _cause(error: BaseException) -> str:
    """What a process died of, as far as Ray says it."""
    text = str(root_cause(error)).lower()
    if "low on memory" in text or "memory monitor" in text:
        return "was ended by Ray, since its node was short of memory"
    if "node has died" in text or "node was terminated" in text or "node died" in text:
        return "was lost with its node"
    return "was killed, by a signal or for want of memory"


def _who(rank: int, state: RankState | None) -> str:
    if state is None:
        return f"rank {rank}"
    where = f"in phase {state.phase}" + (f" after step {state.step}" if state.step else "")
    return f"rank {rank} (host {state.host}, pid {state.pid}, {where})"


def _each(lines: Iterable[str]) -> str:
    shown = list(lines)
    more = [f"{len(shown) - _SHOWN} other ranks"] if len(shown) > _SHOWN else []
    return ", and ".join(shown[:_SHOWN] + more)
