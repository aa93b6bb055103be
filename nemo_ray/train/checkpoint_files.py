"""Checkpoints as safetensors files, for torch.distributed.checkpoint: written aside, read back, published.

    rank-R.safetensors   the parts of tensors that worker R wrote, under the tensors' names
    tensors.json         of each tensor: dtype, shape, and where its parts lie
    state.json           what the caller adds, and "files": size and XXH3 of each other file; written last

torch decides who writes and reads which part; no pickle is written or read. What the tensors mean is
checkpoint.py's business.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from nemo_ray.errors import CheckpointError
from nemo_ray.storage import publish_json, read_json

STATE_NAME = "state.json"
_INDEX_NAME = "tensors.json"
_AT_ONCE_BYTES = 16 * 2**20
_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

T = TypeVar("T")


@dataclass(frozen=True)
class FileFacts:
    """What a file must be like to be intact."""

    size_bytes: int
    xxh3: str

    @classmethod
    def of(cls, path: Path) -> "FileFacts":
        """As the disk gives it, not as memory remembers it."""
        digest, size = xxhash.xxh3_128(), 0
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(_AT_ONCE_BYTES):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


# -- writing --------------------------------------------------------------------------------------


class Writer(StorageWriter):
    """One checkpoint on its way into `folder`, which rank 0 makes; `publish` gives it its name."""

    def __init__(
        self, folder: Path, rank: int, state: Mapping[str, Any], publish: Callable[[], None]
    ) -> None:
        self.folder, self.rank, self.state, self._publish = folder, rank, dict(state), publish

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.folder.mkdir()  # not its parents: they are gone where a newer start took over

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's parts into one file, and hold what the disk has against what was written."""
        if not plan.items:
            return _done([])
        parts = {item.index: planner.resolve_data(item) for item in plan.items}
        tensors = {index.fqn: _plain(part) for index, part in parts.items()}
        assert len(tensors) == len(parts), "one part of a tensor a worker"
        path = self.folder / f"rank-{self.rank}.safetensors"
        facts = _write_tensors(path, tensors)
        _read_back(path, facts)
        stored = _Stored(path.name, facts)
        sizes = {index: tensors[index.fqn].nbytes for index in parts}
        return _done([WriteResult(index, sizes[index], stored) for index in parts])

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written."""
        where: dict[str, list[tuple[dcp.MetadataIndex, str]]] = defaultdict(list)
        files: dict[str, FileFacts] = {}
        for result in (result for of_rank in results for result in of_rank):
            where[result.index.fqn].append((result.index, result.storage_data.file))
            files[result.storage_data.file] = result.storage_data.facts
        index = self.folder / _INDEX_NAME
        entries = metadata.state_dict_metadata
        publish_json(index, {name: _entry(entries[name], parts) for name, parts in sorted(where.items())})
        files[index.name] = FileFacts.of(index)
        listed = {name: {"bytes": facts.size_bytes, "xxh3": facts.xxh3} for name, facts in files.items()}
        publish_json(self.folder / STATE_NAME, {**self.state, "files": listed})
        self._publish()

    # What torch asks of a writer and this one has no use for.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


@dataclass(frozen=True)
class _Stored:
    file: str
    facts: FileFacts


def _plain(part: Any) -> torch.Tensor:
    """A part on the CPU, its values one after the other."""
    tensor: torch.Tensor = part.detach().cpu().contiguous()
    return tensor


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileFacts:
    """A safetensors file, without a second copy of it in memory. Synced to the disk."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as file:
        blocks = [len(text).to_bytes(8, "little") + text]
        for block in (*blocks, *(tensor.view(-1).view(torch.uint8).numpy() for tensor in tensors.values())):
            digest.update(block)
            size += len(block)
            _write_all(file.fileno(), memoryview(block))
        os.fsync(file.fileno())
    return FileFacts(size, digest.hexdigest())


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data[:_AT_ONCE_BYTES]) :]


def _read_back(path: Path, wanted: FileFacts) -> None:
    if (found := FileFacts.of(path)) != wanted:
        raise CheckpointError(
            f"{path}: the disk gives back other bytes than were written ({found.size_bytes:,} of "
            f"{wanted.size_bytes:,} bytes, or another content); look at the disk"
        )


def _entry(tensor: Any, parts: list[tuple[dcp.MetadataIndex, str]]) -> dict[str, Any]:
    shapes = {tuple(chunk.offsets): list(chunk.sizes) for chunk in tensor.chunks}
    offsets = {index: tuple(index.offset or (0,) * len(tensor.size)) for index, _ in parts}
    return {
        "dtype": _NAMES[tensor.properties.dtype],
        "shape": list(tensor.size),
        "parts": [
            {"file": file, "offsets": list(offsets[index]), "shape": shapes[offsets[index]]}
            for index, file in sorted(parts, key=lambda part: offsets[part[0]])
        ],
    }


# -- reading --------------------------------------------------------------------------------------


class Reader(StorageReader):
    """A complete checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[tuple[str, tuple[int, ...]], str] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """What is there. Raises CheckpointError."""
        entries: dict[str, dcp.STORAGE_TYPES] = {}
        for name, entry in self._index().items():
            chunks = []
            for part in entry["parts"]:
                self._files[name, tuple(part["offsets"])] = part["file"]
                sizes = torch.Size(part["offsets"]), torch.Size(part["shape"])
                chunks.append(dcp.ChunkStorageMetadata(*sizes))
            properties = dcp.TensorProperties(dtype=_DTYPES[entry["dtype"]])
            entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return dcp.Metadata(entries)

    def _index(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = read_json(self.folder / _INDEX_NAME)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / _INDEX_NAME} cannot be read: {error}") from None
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this worker needs, and no more. Raises CheckpointError that names the file."""
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            name = item.storage_index.fqn
            wanted[self._files[name, tuple(item.storage_index.offset or ())]].append(item)
        for file, items in wanted.items():
            path = self.folder / file
            try:
                with safe_open(path, framework="pt") as opened:
                    for item in items:
                        target = planner.resolve_tensor(item)
                        target.copy_(_slice(opened, item))
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        return _done(None)

    # What torch asks of a reader and this one has no use for.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(
        self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _slice(opened: Any, item: ReadItem) -> torch.Tensor:
    name = item.storage_index.fqn
    if not item.lengths:
        scalar: torch.Tensor = opened.get_tensor(name)
        return scalar
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    part: torch.Tensor = opened.get_slice(name)[tuple(slice(start, start + n) for start, n in ranges)]
    return part


def damage(folder: Path, part: int, parts: int) -> str | None:
    """What is wrong with a checkpoint, in one line, or None. The files are shared out among `parts` callers,
    of whom this is number `part`."""
    try:
        files = read_json(folder / STATE_NAME)["files"]
        for name in sorted(files)[part::parts]:
            wanted = FileFacts(files[name]["bytes"], files[name]["xxh3"])
            size = (folder / name).stat().st_size
            if size != wanted.size_bytes:
                return f"{name} has {size:,} bytes instead of {wanted.size_bytes:,}"
            if FileFacts.of(folder / name) != wanted:
                return f"the content of {name} is not what was written"
    except KeyError:
        return f"{STATE_NAME} lists no files"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
