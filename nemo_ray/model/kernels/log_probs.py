"""Triton: log-probabilities of target tokens and their slope, in place of the logits.

Two passes over a row: its largest value and sum of exponentials, then the slope. Logits of 2 bytes are read
twice and written once; nothing of their size is made beside them.

Shapes: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _log_probs(logits, targets, log_probs, vocabulary, ignored, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocabulary
    target = tl.load(targets + row)
    valid = target != ignored
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(at + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        # A lane past the end of a short row has seen no value: -inf less -inf is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = higher
    top = tl.max(largest, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - top), 0))
    picked = tl.load(at + tl.where(valid, target, 0)).to(tl.float32)
    tl.store(log_probs + row, tl.where(valid, picked - top - log_sum, 0.0))
    if SLOPE:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            value = tl.load(at + columns, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(columns == target, 1.0, 0.0) - tl.exp(value - top - log_sum)
            tl.store(at + columns, tl.where(valid, slope, 0.0).to(logits.dtype.element_ty), mask=inside)


def log_probs_(logits: torch.Tensor, targets: torch.Tensor, ignored: int, slope: bool) -> torch.Tensor:
    """loss.py's function of the same name."""
    assert logits.is_contiguous()
    num_tokens, vocabulary = logits.shape
    found = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    _log_probs[(num_tokens,)](
        logits, targets, found, vocabulary, ignored, SLOPE=slope, BLOCK=BLOCK, num_warps=8
    )
    return found
