"""What lies between processes: ports that others reach, sums over gloo and NCCL, clocks.

Functions that run in each process of a group, and what their answers mean. Knows no Ray: who runs them where
is cluster.py's.
"""

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_ray.doctor.findings import Finding, error, ok, warning

SUM_BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
REPEATS = 3
WITHIN_S = 20.0
SLOW_GLOO, SLOW_NCCL = 0.1e9, 5e9
"""Bytes a second below which a sum is told to be slow: 1 Gbit/s for counts, and what 100 Gbit/s Ethernet has
left for gradients."""
CLOCK_S, CLOCK_ERROR_S = 2.0, 300.0
"""Object stores refuse requests of a clock that is 15 minutes off."""


class Clock(NamedTuple):
    """How far another process's clock is ahead, in seconds, and how exactly that is known."""

    ahead_s: float
    within_s: float


class Sum(NamedTuple):
    """Bytes a second that each member sent and took in a sum over a group, or why there was none."""

    bytes_per_s: float
    failed: str = ""


# -- in the processes -----------------------------------------------------------------------------


def listen(host: str) -> socket.socket:
    """A port that the others are to reach."""
    return socket.create_server((host, 0))


def reach(places: Mapping[str, tuple[str, int]], within_s: float = 5.0) -> dict[str, str]:
    """What failed, by the name of each place that cannot be connected to."""
    failed = {}
    for name, (host, port) in places.items():
        try:
            socket.create_connection((host, port), timeout=within_s).close()
        except OSError as problem:
            failed[name] = problem.strerror or str(problem)
    return failed


def sum_over_group(backend: str, rank: int, world: int, host: str, port: int) -> Sum:
    """Sum a tensor over a group whose rank 0 is at `host`:`port`; all members call it together."""
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    limit = timedelta(seconds=WITHIN_S)
    group = None
    try:
        store = dist.TCPStore(host, port, world, is_master=rank == 0, timeout=limit)
        kind = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
        group = kind(dist.PrefixStore("doctor", store), rank, world, limit)
        values = torch.ones(SUM_BYTES[backend] // 4, device=device)
        _sum(group, values[:1024])  # connects
        times = []
        for _ in range(REPEATS):
            values.fill_(1.0)
            began_s = time.perf_counter()
            _sum(group, values)
            times.append(time.perf_counter() - began_s)
        if not bool((values == world).all()):
            return Sum(0.0, f"the sum is wrong: {float(values[0])} instead of {world}")
        _sum(group, values[:1])  # nobody leaves before all are done
        return Sum(2 * (world - 1) / world * SUM_BYTES[backend] / min(times))
    except Exception as problem:  # each backend has errors of its own
        return Sum(0.0, (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200])
    finally:
        with contextlib.suppress(Exception):
            if group is not None:
                group.shutdown()


def _sum(group: dist.ProcessGroup, values: torch.Tensor) -> None:
    group.allreduce([values]).wait()
    if values.is_cuda:
        torch.cuda.synchronize()


def clock_of(asked_s: float, theirs_s: float, answered_s: float) -> Clock:
    """From their clock, read between two moments of ours."""
    return Clock(theirs_s - (asked_s + answered_s) / 2, (answered_s - asked_s) / 2)


# -- what it means --------------------------------------------------------------------------------


def judge_ports(failed: Mapping[tuple[str, str], str]) -> Finding:
    """`failed`: by (from, to), why a port that is open there was not reached."""
    if not failed:
        return ok("ports", "every node reaches the ports that the others open")
    (source, target), why = next(iter(failed.items()))
    more = f", and {len(failed) - 1} more pairs" if len(failed) > 1 else ""
    return error(
        "ports",
        f"{source} does not reach a port of {target}: {why}{more}",
        "open all TCP ports between the nodes (security group, firewall): Ray and torch choose theirs",
    )


def judge_sum(backend: str, sums: Sequence[Sum], members: str) -> Finding:
    """The members' answers. `members`: what was summed over, as in "3 nodes"."""
    name = {"gloo": "gloo", "nccl": "NCCL"}[backend]
    failed = next((one.failed for one in sums if one.failed), None)
    if failed is not None:
        variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
        return error(
            name,
            f"a sum over {members} failed: {failed}",
            f"set {variable} to the network interface between the nodes, and open all TCP ports between them",
        )
    rate = min(one.bytes_per_s for one in sums)
    says = f"a sum over {members}: {rate / 1e9:.2f} GB/s"
    if rate < (SLOW_GLOO if backend == "gloo" else SLOW_NCCL):
        remedy = "look at the network between the nodes"
        if backend == "nccl":
            remedy += "; NCCL_DEBUG=INFO says what NCCL uses (EFA, InfiniBand, NVLink)"
        return warning(name, f"{says} is slow", remedy)
    return ok(name, says)


def judge_clocks(clocks: Mapping[str, Clock]) -> Finding:
    """Those of the nodes, by name."""
    name, clock = max(clocks.items(), key=lambda item: abs(item[1].ahead_s) - item[1].within_s)
    off = max(0.0, abs(clock.ahead_s) - clock.within_s)
    if off < CLOCK_S:
        return ok("clocks", f"within {max(CLOCK_S / 20, off):.1f} s of each other")
    says = f"that of {name} is {off:.0f} s {'ahead' if clock.ahead_s > 0 else 'behind'}"
    remedy = "let NTP or chrony set the time"
    return error("clocks", says, remedy) if off >= CLOCK_ERROR_S else warning("clocks", says, remedy)
