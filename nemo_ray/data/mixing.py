"""How often an epoch reads each source, from the weights. Pure.

Without weights an epoch reads every row once. With them it has as many tokens as all sources together, and
source i gives the share weight_i / (sum of weights) of these: so it is read share * total / size times.
"""

from collections.abc import Sequence

from nemo_ray.data.manifest import SourceInfo


def passes(sources: Sequence[SourceInfo]) -> list[float]:
    """Readings of each source's training rows in an epoch; 0 for sources that are only evaluated."""
    tokens = [_training_tokens(source) for source in sources]
    weights = [source.weight for source in sources if not source.evaluation_only]
    if all(weight is None for weight in weights):
        return [0.0 if source.evaluation_only else 1.0 for source in sources]
    total_weight = sum(weight or 0.0 for weight in weights)
    shares = [0.0 if source.evaluation_only else (source.weight or 0.0) / total_weight for source in sources]
    return [share * sum(tokens) / size if size else 0.0 for share, size in zip(shares, tokens, strict=True)]


def _training_tokens(source: SourceInfo) -> float:
    """Estimated, and never 0 where there are rows."""
    if source.evaluation_only:
        return 0.0
    return (source.num_rows - source.held_out_rows) * max(source.tokens_per_row, 1.0)


def describe_mix(sources: Sequence[SourceInfo]) -> list[str]:
    """One line for each source that is not read exactly once an epoch."""
    read = passes(sources)
    total = sum(times * _training_tokens(source) for times, source in zip(read, sources, strict=True))
    return [
        f"{source.name}: {times * _training_tokens(source) / total:.1%} of an epoch's tokens, "
        f"so each row is read {times:.3g} times an epoch"
        for times, source in zip(read, sources, strict=True)
        if not source.evaluation_only and times != 1.0
    ]
