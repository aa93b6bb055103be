"""What a packed forward needs to know of its tokens, as tensors.

Shapes: B packs, T tokens a pack, S sequences in all of them (the padded tail of a pack is one of its own).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedBatch:
    """B packs of T tokens.

    Attributes:
        input_ids: (B, T) int64.
        seq_idx: (B, T) int32, number of the sequence within its pack, never decreasing along T.
        cu_seqlens: (S + 1,) int32, starts of the sequences in the flattened B*T tokens, and the end.
        max_seqlen: length of the longest sequence, in tokens.
    """

    input_ids: torch.Tensor
    seq_idx: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @classmethod
    def from_lengths(cls, input_ids: torch.Tensor, lengths: list[list[int]]) -> "PackedBatch":
        """Describe `input_ids` (B, T) whose row b consists of sequences of `lengths[b]` tokens."""
        device = input_ids.device
        assert all(sum(row) == input_ids.shape[1] for row in lengths)
        seq_idx = torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
        )
        flat = torch.tensor([0] + [length for row in lengths for length in row])
        return cls(
            input_ids=input_ids,
            seq_idx=seq_idx.to(device=device, dtype=torch.int32),
            cu_seqlens=flat.cumsum(0).to(device=device, dtype=torch.int32),
            max_seqlen=int(flat.max()),
        )
