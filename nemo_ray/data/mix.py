"""How the datasets are mixed: planned and real shares, and how they move over an epoch's global order."""

from typing import Any

from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.mixing import passes
from nemo_ray.data.order import EpochOrder
from nemo_ray.data.statistics import existing_stats
from nemo_ray.data.window_list import Window

SLICES = 20
_MOST_DRAWS = 100_000


def epoch_mix(plan: DataPlan, seed: int) -> dict[str, Any]:
    """JSON-ready: tokens of each source in each slice of the first epoch, in the order of training.

    Windows without a shard count as estimated: `estimated_windows` of them. Epochs of very many packs are
    drawn with fewer, larger ones.
    """
    packs: list[int] = []
    tokens: list[float] = []
    estimated = 0
    for window, stats in zip(plan.windows, existing_stats(plan, plan.windows), strict=True):
        if stats is not None:
            packs.append(stats.packs)
            tokens.append(float(stats.tokens))
        else:
            estimated += 1
            tokens.append(_estimate(plan, window))
            packs.append(round(tokens[-1] / plan.sequence_len) or 1)
    scale = min(1.0, _MOST_DRAWS / max(sum(packs), 1))
    drawn = [max(1, round(count * scale)) if count else 0 for count in packs]
    order = EpochOrder(plan, seed, 0, drawn.__getitem__)
    draws: list[tuple[int, float]] = []
    while (position := order.draw()) is not None:
        draws.append((plan.windows[position.window].source, tokens[position.window] / drawn[position.window]))
    slices = [[0.0] * len(plan.sources) for _ in range(min(SLICES, len(draws)))]
    for index, (source, amount) in enumerate(draws):
        slices[index * len(slices) // len(draws)][source] += amount
    return {
        "planned_tokens": planned_tokens(plan),
        "slices": [[round(amount) for amount in one] for one in slices],
        "estimated_windows": estimated,
    }


def planned_tokens(plan: DataPlan) -> list[float]:
    """Tokens of each source in an epoch as they were known before preparing."""
    tokens, read = [0.0] * len(plan.sources), passes(plan.sources)
    for window in plan.windows:
        tokens[window.source] += read[window.source] * _estimate(plan, window)
    return tokens


def _estimate(plan: DataPlan, window: Window) -> float:
    return window.num_rows * plan.sources[window.source].tokens_per_row
