"""The loss: log-probabilities of the target tokens, in chunks, so that logits never exist as a whole.

Its primitive is the log-probability of each token, from which a preference loss could be built as well.

Shapes: B packs, T tokens, N = B*T, H hidden, V vocabulary.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model import kernels
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.patches import packed_hidden

IGNORED = -100
CHUNK_TOKENS = 1024  # at a vocabulary of 131,072 a chunk's bfloat16 logits are 256 MiB


def next_token_targets(labels: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
    """What each position must predict: the label of the next token of the same document, else IGNORED.

    Args:
        labels: (B, T) unshifted.
        seq_idx: (B, T).
    """
    targets = torch.full_like(labels, IGNORED)
    same = seq_idx[:, 1:] == seq_idx[:, :-1]
    targets[:, :-1] = torch.where(same, labels[:, 1:], IGNORED)
    return targets


def log_probs_reference_(
    logits: torch.Tensor, targets: torch.Tensor, ignored: int, slope: bool
) -> torch.Tensor:
    """log p(target) of each token, float32, 0 where the target is `ignored`.

    Args:
        logits: (N, V). With `slope` they are overwritten by their slope: onehot - softmax, or 0.
        targets: (N,) int64.

    Returns: (N,).
    """
    every = F.log_softmax(logits.float(), dim=-1)
    valid = (targets != ignored).unsqueeze(1)
    index = targets.clamp(min=0).unsqueeze(1)
    found = (every.gather(1, index) * valid).squeeze(1)
    if slope:
        softmax = every.exp_()
        logits.copy_(softmax.neg_().scatter_add_(1, index, torch.ones_like(softmax[:, :1])).mul_(valid))
    return found


def log_probs_(logits: torch.Tensor, targets: torch.Tensor, ignored: int, slope: bool) -> torch.Tensor:
    """`log_probs_reference_`, by its kernel on a GPU."""
    if kernels.serve(logits):
        from nemo_ray.model.kernels import log_probs as fast

        return fast.log_probs_(logits, targets, ignored, slope)
    return log_probs_reference_(logits, targets, ignored, slope)


class _ChunkedLogProbs(torch.autograd.Function):
    """Logits exist for one chunk of tokens at a time.

    A token's gradient is its own factor times what does not depend on it: so with a frozen head the forward
    pass makes all of the gradient of `hidden` but that factor, and logits are never made twice. Where the
    head trains, the backward pass makes them again.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = weight.to(hidden.dtype)
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if frozen else None
        log_probs = []
        for part in _chunks(hidden):
            logits = hidden[part] @ head.T
            log_probs.append(log_probs_(logits, targets[part], IGNORED, slope=frozen))
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[part])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        else:
            ctx.save_for_backward(hidden, weight, targets)
        ctx.frozen = frozen
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if ctx.frozen:
            (grad_hidden,) = ctx.saved_tensors
            return grad_hidden * grad.unsqueeze(1).to(grad_hidden.dtype), None, None
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(hidden):
            slope = hidden[part] @ head.T
            log_probs_(slope, targets[part], IGNORED, slope=True)
            slope *= grad[part].unsqueeze(1).to(slope.dtype)
            if grad_hidden is not None:
                torch.mm(slope, head, out=grad_hidden[part])
            grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _chunks(hidden: torch.Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, hidden.shape[0], CHUNK_TOKENS)]


def token_log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) of each token, float32, 0 where the target is IGNORED.

    Args:
        hidden: (N, H).  weight: (V, H), lm_head's, cast to hidden's dtype.  targets: (N,) int64.

    Returns: (N,).
    """
    return _ChunkedLogProbs.apply(hidden, weight, targets)


def bind_loss(model: nn.Module) -> None:
    """Give `model` the method `target_log_probs(batch, targets)`: targets (B, T) -> (B*T,) float32."""

    def target_log_probs(self: nn.Module, batch: PackedBatch, targets: torch.Tensor) -> torch.Tensor:
        hidden = packed_hidden(self, batch)
        return token_log_probs(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    model.target_log_probs = types.MethodType(target_log_probs, model)
