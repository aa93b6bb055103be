"""Frozen weights in 4 bits: NF4 with double quantization, of linear layers and of 3-D expert banks alike.

The arithmetic is bitsandbytes', which a kernel of ours repeats bit for bit on a GPU; the storage is ours: one
row of bytes for each group of weights, in three frozen parameters, so that FSDP2 shards a bank by experts (a
linear layer by groups of output rows) and a rank quantizes only what it holds. A weight takes 4.127 bits.

Shapes: G groups, n weights a group, b = ceil(n / 64) blocks of a group, k = ceil(b / 256).
Source: Dettmers et al., "QLoRA" (2023), section 3.
"""

import logging
import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ray.errors import PatchError
from nemo_ray.model import kernels

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale
MAX_GROUPS = 64  # of a linear layer
# NF4 loses 0.09 of a normal tensor's norm; what is broken in a library or a layout loses more than 0.15.
MAX_ERROR = 0.13
# FSDP2 of torch 2.11 shards floating-point parameters only: there the same bytes are called bfloat16.
STORAGE = torch.uint8 if torch.__version__ >= (2, 12) else torch.bfloat16


def bitsandbytes() -> ModuleType:
    """The library, imported where something is in 4 or 8 bits only; on a CPU it warns of a kernel that is not
    used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@cache
def _weight_values(device: torch.device) -> torch.Tensor:
    """The 16 values that a weight's half byte stands for."""
    return bitsandbytes().functional.get_4bit_type("nf4", device=device)


@cache
def _scale_values(device: torch.device) -> torch.Tensor:
    """The 256 values that a scale's byte stands for."""
    return bitsandbytes().functional.create_dynamic_map().to(device)


def num_groups(shape: tuple[int, ...]) -> int:
    """Groups of a weight: the experts of a bank (E, O, I); of a linear layer (O, I) as many as rows allow."""
    return shape[0] if len(shape) == 3 else math.gcd(shape[0], MAX_GROUPS)


class Workspace:
    """Memory for one whole weight at a time, the largest of a model: banks of a GiB that came and went would
    leave holes between smaller tensors."""

    def __init__(self) -> None:
        self.num_weights = 0
        self._buffer: torch.Tensor | None = None

    def make_room_for(self, num_weights: int) -> None:
        """Called for each weight that will use it."""
        self.num_weights = max(self.num_weights, num_weights)

    def get(self, num_weights: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(num_weights,) of what the call before this one was given too."""
        if self._buffer is None or self._buffer.dtype != dtype or self._buffer.device != device:
            self._buffer = torch.empty(self.num_weights, dtype=dtype, device=device)
        return self._buffer[:num_weights]


class QuantizedWeight(nn.Module):
    """A frozen weight of `shape`, (O, I) or (E, O, I), in 4 bits. Not called: `dequantize` gives its values.

    Parameters: packed (G, 32 b) two weights a byte, codes (G, 256 k) a byte for each block's scale,
    nested (G, 4 (k + 1)) the scales of the scales and their offset, float32 viewed as bytes. All of dtype
    `STORAGE`, where a bfloat16 counts for two bytes.
    """

    def __init__(
        self, shape: tuple[int, ...], device: torch.device, workspace: Workspace | None = None
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.num_groups = num_groups(shape)
        self.group_size = self.shape.numel() // self.num_groups
        self.num_blocks = -(-self.group_size // BLOCK)
        self.workspace = workspace or Workspace()
        self.workspace.make_room_for(self.shape.numel())
        scale_blocks = -(-self.num_blocks // SCALE_BLOCK)
        widths = {
            "packed": self.num_blocks * BLOCK // 2,
            "codes": scale_blocks * SCALE_BLOCK,
            "nested": 4 * (scale_blocks + 1),
        }
        for name, num_bytes in widths.items():
            size = (self.num_groups, num_bytes // STORAGE.itemsize)
            stored = torch.empty(size, dtype=STORAGE, device=device)
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))

    def _apply(self, fn, recurse: bool = True):
        """As of any module, but a cast leaves the bytes, also where they are called bfloat16."""

        def keep(stored: torch.Tensor) -> torch.Tensor:
            made = fn(stored)
            return made if made.dtype == stored.dtype else stored.to(made.device)

        return super()._apply(keep, recurse)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, of `self.shape`, in memory of its own."""
        return self._values(*self._stored(), dtype).reshape(self.shape)

    def borrow(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight in the model's workspace, where the next call puts another one: to be used in the
        stream's order at once, and kept by nobody. Where kernels do not serve, in memory of its own."""
        if not kernels.serve(self.packed):
            return self.dequantize(dtype)
        out = self.workspace.get(self.shape.numel(), dtype, self.packed.device)
        return self._values(*self._stored(), dtype, out).view(self.shape)

    def _stored(self) -> tuple[torch.Tensor, ...]:
        return tuple(p.view(torch.uint8) for p in (self.packed, self.codes, self.nested))

    def quantize(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of (packed, codes, nested), dtype `STORAGE`, for `values` (groups, n) of some of the groups.

        Raises: PatchError where what a product will take is not near the values: an installed library is not
            to be trusted.
        """
        bnb = bitsandbytes().functional
        groups, size = values.shape
        assert size == self.group_size
        padded = F.pad(values, (0, self.num_blocks * BLOCK - size)).contiguous()
        packed, state = bnb.quantize_4bit(padded.view(-1), blocksize=BLOCK, quant_type="nf4")
        scales = state.absmax.view(groups, self.num_blocks)
        # One mean at a time: its last bit must not depend on how many groups a rank quantizes together.
        offsets = torch.stack([row.mean() for row in scales])
        width = self.codes.shape[1] * STORAGE.itemsize
        centred = F.pad(scales - offsets[:, None], (0, width - self.num_blocks)).contiguous()
        codes, nested = bnb.quantize_blockwise(
            centred.view(-1), code=_scale_values(values.device), blocksize=SCALE_BLOCK
        )
        stored = (
            packed.view(groups, -1),
            codes.view(groups, -1),
            torch.cat([nested.absmax.view(groups, -1), offsets[:, None]], dim=1).view(torch.uint8),
        )
        self._check(values, *stored)
        return tuple(rows.view(STORAGE) for rows in stored)

    def _values(
        self,
        packed: torch.Tensor,
        codes: torch.Tensor,
        nested: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(groups, n) from rows of bytes; `out`: where to (groups * n,), for a GPU only."""
        if not kernels.serve(packed):
            return self._values_reference(packed, codes, nested, dtype)
        from nemo_ray.model.kernels.nf4 import dequantize

        device = packed.device
        if out is None:
            out = torch.empty(packed.shape[0] * self.group_size, dtype=dtype, device=device)
        values = _weight_values(device), _scale_values(device)
        return dequantize(packed, codes, nested, *values, out.view(packed.shape[0], -1))

    def _values_reference(
        self, packed: torch.Tensor, codes: torch.Tensor, nested: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """`_values` by bitsandbytes, on any device."""
        bnb = bitsandbytes().functional
        groups = packed.shape[0]
        scales = nested.view(torch.float32)
        nested_state = bnb.QuantState(
            absmax=scales[:, :-1].contiguous().view(-1),  # bitsandbytes reads past strides
            code=_scale_values(packed.device),
            blocksize=SCALE_BLOCK,
            dtype=torch.float32,
        )
        absmax = bnb.dequantize_blockwise(codes.contiguous().view(-1), nested_state).view(groups, -1)
        absmax = absmax.add_(scales[:, -1:])[:, : self.num_blocks].contiguous()
        # A flat shape: with any other, bitsandbytes 0.50 on a CPU wants rows of a multiple of 64.
        state = bnb.QuantState(
            absmax=absmax.view(-1),
            shape=torch.Size((groups * self.num_blocks * BLOCK,)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        flat = bnb.dequantize_4bit(packed.contiguous().view(-1, 1), state)
        return flat.view(groups, -1)[:, : self.group_size]

    def _check(self, values: torch.Tensor, *stored: torch.Tensor) -> None:
        first = values[:1].float()
        back = self._values(*(rows[:1] for rows in stored), values.dtype).float()
        error = float((back - first).norm() / first.norm().clamp(min=1e-30))
        if not error <= MAX_ERROR:
            raise PatchError(
                f"bitsandbytes {bitsandbytes().__version__} on {values.device.type}: a weight comes back "
                f"from 4 bits with {error:.3f} of its norm lost (at most {MAX_ERROR}); try another version "
                "(on a GPU, of triton too)"
            )

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, nf4, groups={self.num_groups}"
