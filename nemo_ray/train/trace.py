"""What a Chrome trace of steps says of a GPU's time: by kind of kernel, and how much is communication."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

# The first that matches names a kernel's class.
CLASSES = {
    "communication": re.compile(r"nccl|Memcpy PtoP", re.I),
    "host copies": re.compile(r"Memcpy (DtoH|HtoD)", re.I),
    "scan and conv": re.compile(r"conv1d|chunk_scan|chunk_state|chunk_cumsum|bmm_chunk|state_passing", re.I),
    "attention": re.compile(r"flash|fmha|attention", re.I),
    "matmul": re.compile(r"gemm|gemv|nvjet|cutlass|matmul|splitk|bmm|grouped_mm|add_factors", re.I),
    "other": re.compile(""),
}
BESIDE = ("communication", "host copies")  # what kernels can hide
SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
NUM_KERNELS = 40  # that take the most time


def kernel_class(name: str) -> str:
    """The class of a kernel of that name."""
    return next(kind for kind, pattern in CLASSES.items() if pattern.search(name))


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) intervals cover together: overlaps count once."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def summarize(events: Iterable[Mapping[str, Any]], num_steps: int) -> dict[str, Any]:
    """Figures a step from the events of a Chrome trace (times in us) of steps and one more launch, which ends
    them.

    `busy_ms` is the union of all kernels, copies and fills; the classes' times are sums.
    `communication_alone_ms` and `host_copies_alone_ms` are the parts of it in which nothing else ran.
    """
    device, host = [], []
    for event in events:
        if "cat" in event and event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append(event)
        elif "cat" in event and event["cat"] in ("cuda_runtime", "cuda_driver"):
            host.append(event)
    device = sorted(device, key=lambda event: event["ts"])[:-1]
    launches = sorted(event["ts"] for event in host if "Launch" in event["name"])
    calls = [event["name"] for event in host if launches and launches[0] <= event["ts"] < launches[-1]]
    times, counts = defaultdict(float), defaultdict(int)
    classes = dict.fromkeys(CLASSES, 0.0)
    everything: list[tuple[float, float]] = []
    others: dict[str, list[tuple[float, float]]] = {kind: [] for kind in BESIDE}
    for event in device:
        kind = kernel_class(event["name"])
        classes[kind] += event["dur"] / 1e3 / num_steps
        times[event["name"], kind] += event["dur"] / 1e3 / num_steps
        counts[event["name"], kind] += 1
        span = (event["ts"], event["ts"] + event["dur"])
        everything.append(span)
        for beside, spans in others.items():
            if kind != beside:
                spans.append(span)
    busy_us = union(everything)
    alone_ms = {kind: (busy_us - union(spans)) / 1e3 / num_steps for kind, spans in others.items()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:NUM_KERNELS]
    return {
        "busy_ms": busy_us / 1e3 / num_steps,
        "class_ms": classes,
        "communication_alone_ms": alone_ms["communication"],
        "host_copies_alone_ms": alone_ms["host copies"],
        "kernels": sum(event["cat"] == "kernel" for event in device) / num_steps,
        "launches": sum("Launch" in name for name in calls) / num_steps,
        "synchronizations": sum(name.startswith(SYNCHRONIZATIONS) for name in calls) / num_steps,
        "copies_to_host": sum("DtoH" in event["name"] for event in device) / num_steps,
        "largest": [
            {"name": key[0], "class": key[1], "ms": times[key], "calls": counts[key] / num_steps}
            for key in largest
        ],
    }
