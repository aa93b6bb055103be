"""The Triton kernels beside their torch references at the sizes of real models, on a GPU.

Prints microseconds of both, and the memory speed of what the kernel has to read and write at the least.

    python benchmarks/kernel_times.py [--model nano|super] [--tokens 8192] [--rank 16] [--out OUT.json]

`--model tiny` runs a few rows on a CPU, in Triton's interpreter, to see that it runs at all.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")
if "tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from nemo_ray.model import activation, experts, kernels, norm, routing
from nemo_ray.model.linear import grouped_matmul
from nemo_ray.model.quant import QuantizedWeight
from nemo_ray.train import loss


@dataclass(frozen=True)
class Sizes:
    """H model (or latent) size, I expert size, E experts, K experts a token, V vocabulary."""

    hidden: int
    expert: int
    num_experts: int
    top_k: int
    vocabulary: int


SIZES = {
    "nano": Sizes(2688, 1856, 128, 6, 131072),
    "super": Sizes(1024, 2688, 512, 22, 131072),
    "tiny": Sizes(64, 32, 8, 2, 128),
}
LOSS_TOKENS = 1024  # a chunk of the loss
Case = tuple[str, Callable[[], object], int]  # name, what is timed, bytes that it must move


def cases(sizes: Sizes, tokens: int, rank: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """One call of each kernel, or of its reference where kernels do not serve."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(kind)

    H, I, E, K = sizes.hidden, sizes.expert, sizes.num_experts, sizes.top_k  # noqa: E741
    slots_per_token, width = tokens * K, dtype.itemsize
    logits, bias = draw(tokens, E, kind=torch.float32), torch.zeros(E, device=device)
    weights, chosen = routing.route_reference(logits, bias, K, 1, 1, True, 2.5)
    slots = routing.sort_slots_reference(chosen, E)
    x, rows, hidden = draw(tokens, H), draw(slots_per_token, H), draw(slots_per_token, I)
    inner, up_B, down_B = draw(slots_per_token, rank), draw(E, I, rank), draw(E, H, rank)
    down_A = draw(E, rank, I).transpose(1, 2)
    grad, at_sorted = draw(slots_per_token, I), weights.flatten()[slots.order]
    bank = QuantizedWeight((E, I, H), device)
    for stored in bank.parameters():
        stored.data.view(torch.uint8).random_(0, 255, generator=generator)
    bank.nested.data.view(torch.uint8).zero_()
    up_bank, up_A = draw(E, I, H).transpose(1, 2), draw(E, rank, H).transpose(1, 2)
    scores = draw(min(tokens, LOSS_TOKENS), sizes.vocabulary)
    targets = torch.randint(0, sizes.vocabulary, scores.shape[:1], generator=generator, device=device)
    layer = torch.nn.RMSNorm(H, device=device).requires_grad_(False)
    layer.variance_epsilon = 1e-5
    stream = draw(tokens, H).requires_grad_()
    up, down, token = slots_per_token * I * width, slots_per_token * H * width, tokens * H * width
    return [
        ("route", lambda: routing.route(logits, bias, K, 1, 1, True, 2.5), logits.nbytes),
        ("sort_slots", lambda: routing.sort_slots(chosen, E), 24 * slots_per_token),
        ("spread", lambda: routing.spread(x, slots.back, K), token + down),
        ("combine", lambda: routing.combine(rows, slots.back, weights), token + down),
        ("relu_squared", lambda: activation.relu_squared(hidden), 2 * up),
        ("relu_squared_gradient", lambda: activation.relu_squared_gradient(grad, hidden), 3 * up),
        ("add_factors, up", lambda: experts.add_factors_(hidden, inner, up_B, slots.ends), 2 * up),
        ("add_factors, down", lambda: experts.add_factors_(rows, inner, down_B, slots.ends), 2 * down),
        (
            "activation_gradient",
            lambda: experts.activation_gradient_(grad, hidden, at_sorted, inner, down_A, slots.ends, True),
            4 * up,
        ),
        ("log_probs, slope", lambda: loss.log_probs_(scores, targets, loss.IGNORED, True), 3 * scores.nbytes),
        (
            "rms_norm, both ways",
            lambda: torch.autograd.grad(norm.residual_norm(stream, layer), stream, (x, x)),
            6 * token,
        ),
        ("4-bit bank", lambda: bank.borrow(dtype), int(bank.shape.numel() * (width + 4.127 / 8))),
        # No kernel of ours: what the rest is to be seen against.
        ("grouped matmul, up", lambda: grouped_matmul(rows, up_bank, slots.ends), down + up + up_bank.nbytes),
        ("grouped matmul, A", lambda: grouped_matmul(rows, up_A, slots.ends), down),
    ]


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call; on a GPU without what the host adds, from a graph of ten calls."""
    run()
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - began)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) * 1e3 / 10


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="nano")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tiny = arguments.model == "tiny"
    device = torch.device("cpu" if tiny else "cuda")
    tokens, dtype = (16, torch.float32) if tiny else (arguments.tokens, torch.bfloat16)
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':<24}{'kernel us':>12}{'reference us':>14}{'GB/s':>8}")
    serve = kernels.serve
    for served in (False, True):
        kernels.serve = (lambda tensor: True) if served else (lambda tensor: False)
        for name, run, num_bytes in cases(SIZES[arguments.model], tokens, arguments.rank, device, dtype):
            row = rows.setdefault(name, {"bytes": num_bytes})
            row["kernel_us" if served else "reference_us"] = microseconds(run, device)
    kernels.serve = serve
    for name, row in rows.items():
        speed = row["bytes"] / row["kernel_us"] / 1e3
        print(f"{name:<24}{row['kernel_us']:>12,.1f}{row['reference_us']:>14,.1f}{speed:>8,.0f}")
    if arguments.out:
        name = "CPU" if tiny else torch.cuda.get_device_name()
        arguments.out.write_text(
            json.dumps({"device": name, "tokens": tokens, "rows": rows}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
