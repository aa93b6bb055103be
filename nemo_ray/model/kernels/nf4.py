"""Triton: the values of 4-bit weights as nemo_ray.model.quant stores them, in one pass and no other memory.

Bit for bit bitsandbytes' own: the same float32 products and sums, each rounded by itself.

Shapes as there: G groups, n weights a group, b blocks of a group, k blocks of its scales.
"""

import torch
import triton
import triton.language as tl

from nemo_ray.model.quant import BLOCK, SCALE_BLOCK

# 32-bit words of eight weights, of one program: four to a thread, which are read as 16 bytes and written as
# four times 16. All of a program's weights have one scale of scales.
WORDS = 512


@triton.jit
def _dequantize(
    packed, codes, nested, weight_values, scale_values, out, group_size,
    BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(group_size, BLOCK)
    num_scale_blocks = tl.cdiv(num_blocks, SCALE_BLOCK)
    words_per_block: tl.constexpr = BLOCK // 8
    num_words = num_blocks * words_per_block
    group = tl.program_id(1).to(tl.int64)
    packed += group * num_words
    codes += group * (num_scale_blocks * SCALE_BLOCK)
    nested += group * (num_scale_blocks + 1)
    out += group * group_size

    first = tl.program_id(0) * WORDS
    word = first + tl.arange(0, WORDS)
    stored = word < num_words
    code = tl.load(codes + word // words_per_block, mask=stored, other=0).to(tl.int32)
    scale = tl.load(scale_values + code) * tl.load(nested + first // (words_per_block * SCALE_BLOCK))
    scale += tl.load(nested + num_scale_blocks)

    # Of a byte the high half comes first: in a word the weights begin at bits 4, 0, 12, 8, 20, 16, 28, 24.
    eight = tl.arange(0, 8)
    shifts = (eight * 4) ^ 4
    halves = (tl.load(packed + word, mask=stored, other=0)[:, None] >> shifts[None, :]) & 15
    # 16 values in one cache line; a tree of selections would take longer than the memory does.
    values = tl.load(weight_values + halves) * scale[:, None]
    at = word[:, None] * 8 + eight[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < group_size)


def dequantize(
    packed: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    weight_values: torch.Tensor,
    scale_values: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write the weights of G groups to `out` (G, n), which is returned; all tensors are contiguous.

    Args:
        packed: (G, 32 b) uint8. codes: (G, 256 k) uint8. nested: (G, 4 (k + 1)) uint8.
        weight_values: (16,) float32, what half a byte of packed stands for.
        scale_values: (256,) float32, what a byte of codes stands for.
        out: bfloat16, float16 or float32.
    """
    groups, group_size = out.shape
    assert group_size < 2**31 and all(t.is_contiguous() for t in (packed, codes, nested, out))
    words = packed.view(torch.int32)
    grid = (triton.cdiv(words.shape[1], WORDS), groups)
    _dequantize[grid](
        words, codes, nested.view(torch.float32), weight_values, scale_values, out, group_size,
        BLOCK=BLOCK, SCALE_BLOCK=SCALE_BLOCK, WORDS=WORDS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
