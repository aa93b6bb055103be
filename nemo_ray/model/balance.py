"""How evenly tokens are spread over experts."""

import torch
from torch import nn

from nemo_ray.model.experts import RoutedExperts


def max_violation(model: nn.Module) -> torch.Tensor | None:
    """How far a layer's busiest expert is above an even load, (max - mean) / mean, averaged over the layers.

    Of the passes of training since the last call, and on the device; None for a model without experts.

    A block that makes its activations again counts its tokens twice, which changes no ratio.
    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024).
    """
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    counted = [module.counted_ends for module in experts if module.counted_ends is not None]
    if not counted:
        return None
    ends = torch.stack(counted)  # (layers, experts)
    torch._foreach_zero_(counted)
    loads = ends.diff(prepend=torch.zeros_like(ends[:, :1])).float()
    mean = loads.mean(1)
    return ((loads.amax(1) - mean) / mean.clamp_min(1e-9)).mean()
