"""The loss: log-probabilities of the target tokens, in chunks, so that logits never exist as a whole.

Its primitive is the log-probability of each token, from which a preference loss could be built as well.

Shapes: B packs, T tokens, N = B*T, H hidden, V vocabulary.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.patches import packed_hidden

IGNORED = -100
CHUNK_TOKENS = 512  # at a vocabulary of 131,072 a chunk's float32 logits are 256 MiB


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


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward keeps one float a token; backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = weight.to(hidden.dtype)
        log_probs = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[part] @ head.T).float()
            log_probs[part] = -F.cross_entropy(logits, targets[part], ignore_index=IGNORED, reduction="none")
        ctx.save_for_backward(hidden, weight, targets)
        return log_probs

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            valid = targets[part] != IGNORED
            # d log p / d logits = onehot - softmax
            slope = -F.softmax((hidden[part] @ head.T).float(), dim=-1)
            slope.scatter_add_(1, targets[part].clamp(min=0)[:, None], torch.ones_like(slope[:, :1]))
            slope = (slope * (grad[part] * valid)[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ head
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None


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
