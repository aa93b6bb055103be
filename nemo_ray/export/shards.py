"""Safetensors files read and written one tensor at a time, so that a file never lies in memory whole.

Owns bytes and headers. Which tensors change, and how, is the callers' business.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from nemo_ray.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the format, of the types in which a weight can be changed."""

_COPIED_AT_ONCE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry of a header; `start` and `stop` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header as it stands there, and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    tensors: Mapping[str, StoredTensor]


def read_shard(path: Path, key: str = "base_model") -> Shard:
    """Read the header of a file.

    Raises: CheckpointError that names the file where it is missing, truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt"):  # holds the header against the file's size
            pass
        with open(path, "rb") as file:
            length = file.read(8)
            text = file.read(int.from_bytes(length, "little"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{key}: {path} cannot be read: {error}") from None
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), *(8 + len(text) + at for at in entry["data_offsets"])
        )
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    }
    return Shard(path, length + text, tensors)


def rewrite(
    shard: Shard, path: Path, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor | None]]
) -> None:
    """Copy a file with the same header, some of its tensors changed.

    Args:
        changes: by name: takes the tensor and changes it in place, or returns another one of its shape and
            dtype.
    """
    with open(shard.path, "rb") as source, open(path, "wb") as target:
        target.write(shard.header)
        for name, stored in shard.tensors.items():
            if name not in changes:
                source.seek(stored.start)
                _copy(source, target, stored.stop - stored.start, shard.path)
                continue
            tensor = _read(source, stored, shard.path)
            changed = changes[name](tensor)
            _write(tensor if changed is None else changed, stored.dtype, stored.shape, target)
        _finish(target, path)


def write_file(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write a new file.

    Args:
        layout: name -> (dtype as the format names it, shape), in order.
        tensors: their values, in the same order; one is asked for at a time.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in layout.items():
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor, (dtype, shape) in zip(tensors, layout.values(), strict=True):
            _write(tensor, dtype, shape, target)
        _finish(target, path)


def _read(source: BinaryIO, stored: StoredTensor, path: Path) -> torch.Tensor:
    buffer = bytearray(stored.stop - stored.start)
    source.seek(stored.start)
    if source.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError(f"base_model: {path} ended while it was read")
    return torch.frombuffer(buffer, dtype=DTYPES[stored.dtype]).view(stored.shape)


def _write(tensor: torch.Tensor, dtype: str, shape: tuple[int, ...], target: BinaryIO) -> None:
    assert tensor.dtype == DTYPES[dtype] and tuple(tensor.shape) == shape, "the header says so"
    target.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int, path: Path) -> None:
    while num_bytes:
        piece = source.read(min(num_bytes, _COPIED_AT_ONCE_BYTES))
        if not piece:
            raise CheckpointError(f"base_model: {path} ended while it was read")
        target.write(piece)
        num_bytes -= len(piece)


def _finish(target: BinaryIO, path: Path) -> None:
    target.flush()
    os.fsync(target.fileno())
    path.chmod(0o644)
