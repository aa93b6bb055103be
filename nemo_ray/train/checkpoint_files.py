"""Checkpoints as safetensors files, for torch.distributed.checkpoint: written, read back, read by slices.

    rank-R.safetensors   the parts of tensors that worker R wrote, under the tensors' names
    tensors.json         of each tensor: dtype, shape, and where its parts lie
    state.json           what the caller adds, and "files": size and XXH3 of each other file; written last

On a file system they are written into a folder that has no name yet. In an object store they are written
where they stay, with a token of the workers' start in their names (rank-R.TOKEN.safetensors,
tensors.TOKEN.json): state.json, one object, names those that belong together, whatever else an older start
leaves beside them.

torch decides who writes and reads which part; no pickle is written or read. What the tensors mean, and how
state.json is published, is checkpoint.py's business.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from nemo_ray.bare import is_bare
from nemo_ray.errors import CheckpointError, StorageError
from nemo_ray.storage import file_facts, is_url, join, open_ranges, publish_blocks, read_json

STATE_NAME = "state.json"
_TENSORS_SUFFIX = ".safetensors"
_AT_ONCE_BYTES = 16 * 2**20
_SKIPPED_BYTES = 2**20
"""Read along with what is needed around them: another request to a store would take longer."""
_ALIGNMENT = 8
_LENGTH_BYTES = 8
"""The length of a safetensors file's header, in front of it."""
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
    def of(cls, blocks: Iterable[bytes | memoryview]) -> "FileFacts":
        digest, size = xxhash.xxh3_128(), 0
        for block in blocks:
            digest.update(block)
            size += len(block)
        return cls(size, digest.hexdigest())


def _content(path: str) -> Iterator[memoryview]:
    """A file as the disk or the store gives it, not as memory remembers it; a block holds until the next."""
    buffer = memoryview(bytearray(_AT_ONCE_BYTES))
    with open_ranges(path) as file:
        if not is_url(path):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            yield buffer[:count]


# -- writing --------------------------------------------------------------------------------------


class Writer(StorageWriter):
    """One checkpoint on its way into `folder`.

    Args:
        folder: path of a folder that rank 0 makes, or URL where the checkpoint is to lie.
        state: what state.json holds besides "files".
        wait: returns when the values of this worker's tensors are there.
        publish: takes the content of state.json when all the rest is written, and publishes the checkpoint.
        token: part of the names; on a store, of one start of the workers only.
    """

    def __init__(
        self,
        folder: Path | str,
        rank: int,
        state: Mapping[str, Any],
        wait: Callable[[], None],
        publish: Callable[[dict[str, Any]], None],
        token: str = "",
    ) -> None:
        self.folder, self.rank, self.state = str(folder), rank, dict(state)
        self._wait, self._publish = wait, publish
        self._token = f".{token}" if token else ""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator and not is_url(self.folder):
            os.mkdir(self.folder)  # not its parents: they are gone where a newer start took over

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's parts into one file."""
        self._wait()
        if not plan.items:
            return _done([])
        parts = {item.index: planner.resolve_data(item) for item in plan.items}
        tensors = {index.fqn: _plain(part) for index, part in parts.items()}
        assert len(tensors) == len(parts), "one part of a tensor a worker"
        name = f"rank-{self.rank}{self._token}{_TENSORS_SUFFIX}"
        stored = _Stored(name, _write(join(self.folder, name), lambda: _tensor_blocks(tensors)))
        sizes = {index: tensors[index.fqn].nbytes for index in parts}
        return _done([WriteResult(index, sizes[index], stored) for index in parts])

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written."""
        where: dict[str, list[tuple[dcp.MetadataIndex, str]]] = defaultdict(list)
        files: dict[str, FileFacts] = {}
        for result in (result for of_rank in results for result in of_rank):
            where[result.index.fqn].append((result.index, result.storage_data.file))
            files[result.storage_data.file] = result.storage_data.facts
        entries = metadata.state_dict_metadata
        index = {name: _entry(entries[name], parts) for name, parts in sorted(where.items())}
        text = json.dumps(index, indent=2).encode() + b"\n"
        name = f"tensors{self._token}.json"
        files[name] = _write(join(self.folder, name), lambda: [text])
        listed = {name: {"bytes": facts.size_bytes, "xxh3": facts.xxh3} for name, facts in files.items()}
        self._publish({**self.state, "files": listed})

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


def _tensor_blocks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, without a second copy of it in memory."""
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
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    for tensor in tensors.values():
        data = tensor.view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _AT_ONCE_BYTES):
            yield data[start : start + _AT_ONCE_BYTES]


def _write(path: str, blocks: Callable[[], Iterable[bytes | memoryview]]) -> FileFacts:
    """Write a file, and hold what the disk or the store gives back against what was written."""
    wanted = FileFacts.of(blocks())
    if is_url(path):
        publish_blocks(path, blocks, wanted.size_bytes)
    else:
        _write_synced(path, blocks())
    found = FileFacts.of(_content(path))
    if found != wanted:
        place = "store" if is_url(path) else "disk"
        raise CheckpointError(
            f"{path}: the {place} gives back other bytes than were written ({found.size_bytes:,} of "
            f"{wanted.size_bytes:,} bytes, or another content); look at the {place}"
        )
    return wanted


def _write_synced(path: str, blocks: Iterable[bytes | memoryview]) -> None:
    """Under its own name, and to the disk."""
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            _write_all(file.fileno(), memoryview(block))
        os.fsync(file.fileno())


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


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

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)
        self._files: dict[tuple[str, tuple[int, ...]], str] = {}
        self._listed: frozenset[str] = frozenset()

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """What is there. Raises CheckpointError."""
        entries: dict[str, dcp.STORAGE_TYPES] = {}
        for name, entry in self._index().items():
            chunks = []
            for part in entry["parts"]:
                if part["file"] not in self._listed:
                    raise CheckpointError(
                        f"{self.folder}: {name} lies in {part['file']}, no file of this one"
                    )
                self._files[name, tuple(part["offsets"])] = part["file"]
                sizes = torch.Size(part["offsets"]), torch.Size(part["shape"])
                chunks.append(dcp.ChunkStorageMetadata(*sizes))
            properties = dcp.TensorProperties(dtype=_DTYPES[entry["dtype"]])
            entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return dcp.Metadata(entries)

    def _index(self) -> dict[str, Any]:
        path = join(self.folder, STATE_NAME)
        try:
            self._listed = frozenset(read_json(path)["files"])
            for name in self._listed:
                if not is_bare(name):
                    raise CheckpointError(f"{path} names {name!r}, which is no file beside it")
            (name,) = (name for name in self._listed if not name.endswith(_TENSORS_SUFFIX))
            path = join(self.folder, name)
            found: dict[str, Any] = read_json(path)
        except KeyError:
            raise CheckpointError(f"{path} lists no files") from None
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this worker needs, and no more. Raises CheckpointError that names the file."""
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            name = item.storage_index.fqn
            wanted[self._files[name, tuple(item.storage_index.offset or ())]].append(item)
        for file, items in wanted.items():
            path = join(self.folder, file)
            read = _read_object if is_url(path) else _read_file
            try:
                for item, part in read(path, items):
                    target = planner.resolve_tensor(item)
                    target.copy_(part)
                    planner.commit_tensor(item, target)
            except (OSError, ValueError, SafetensorError) as error:
                raise _unreadable(path, error) from None
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


def _unreadable(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(error) if isinstance(error, StorageError) else f"{path} cannot be read: {error}"
    )


def _read_file(path: str, items: Iterable[ReadItem]) -> Iterator[tuple[ReadItem, torch.Tensor]]:
    with safe_open(path, framework="pt") as opened:
        for item in items:
            name = item.storage_index.fqn
            whole = opened.get_slice(name) if item.lengths else opened.get_tensor(name)
            yield item, whole[_slices(item)]


def _slices(item: ReadItem) -> tuple[slice, ...]:
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    return tuple(slice(start, start + length) for start, length in ranges)


class _Rows(NamedTuple):
    """The rows of a stored tensor that an item needs, and where they lie in the file."""

    start: int
    stop: int
    item: ReadItem
    dtype: torch.dtype
    shape: tuple[int, ...]


def _read_object(url: str, items: Iterable[ReadItem]) -> Iterator[tuple[ReadItem, torch.Tensor]]:
    """In the order of the file, and no more than lies close together at once."""
    with open_ranges(url) as file:
        header, data_start = _header(file)
        wanted = sorted((_rows(header, data_start, item) for item in items), key=lambda rows: rows.start)
        for together in _close_together(wanted):
            start = together[0].start
            data = _range(file, start, max(rows.stop for rows in together))
            for rows in together:
                own = data[rows.start - start : rows.stop - start].clone()  # where its dtype may begin
                slices = (slice(None), *_slices(rows.item)[1:]) if rows.shape else ()
                yield rows.item, own.view(rows.dtype).view(rows.shape)[slices]


def _header(file: io.RawIOBase) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    start = _LENGTH_BYTES
    stop = start + int.from_bytes(_range(file, 0, start).numpy().tobytes(), "little")
    if stop > file.seek(0, os.SEEK_END):
        raise ValueError("its header is longer than the file")
    header: dict[str, Any] = json.loads(_range(file, start, stop).numpy().tobytes())
    return header, stop


def _range(file: io.RawIOBase, start: int, stop: int) -> torch.Tensor:
    """Bytes of a file."""
    data = torch.empty(stop - start, dtype=torch.uint8)
    view = data.numpy().data
    file.seek(start)
    while view:
        count = file.readinto(view[:_AT_ONCE_BYTES])
        if not count:
            raise ValueError(f"it ends before byte {stop:,}")
        view = view[count:]
    return data


def _rows(header: Mapping[str, Any], data_start: int, item: ReadItem) -> _Rows:
    name = item.storage_index.fqn
    if name not in header:
        raise ValueError(f"it does not hold {name}")
    entry = header[name]
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    start, stop = (data_start + offset for offset in entry["data_offsets"])
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start:,} bytes, which do not fit its shape")
    if not shape:
        return _Rows(start, stop, item, dtype, ())
    row_bytes = prod(shape[1:]) * dtype.itemsize
    start += item.storage_offsets[0] * row_bytes
    stop = start + item.lengths[0] * row_bytes
    return _Rows(start, stop, item, dtype, (item.lengths[0], *shape[1:]))


def _close_together(wanted: Iterable[_Rows]) -> Iterator[list[_Rows]]:
    """What one request is to bring, each time; `wanted` in the order of the file."""
    together: list[_Rows] = []
    for rows in wanted:
        far = together and rows.start - together[-1].stop > _SKIPPED_BYTES
        if far or (together and rows.stop - together[0].start > _AT_ONCE_BYTES):
            yield together
            together = []
        together.append(rows)
    if together:
        yield together


def damage(folder: Path | str, part: int, parts: int) -> str | None:
    """What is wrong with a checkpoint, in one line, or None. The files are shared out among `parts` callers,
    of whom this is number `part`.

    Raises: StorageError where a store does not answer, which says nothing about the checkpoint.
    """
    name = STATE_NAME
    try:
        files = read_json(join(str(folder), name))["files"]
        for name in sorted(files)[part::parts]:
            if not is_bare(name):
                return f"{STATE_NAME} names {name!r}, which is no file beside it"
            path, wanted = join(str(folder), name), FileFacts(files[name]["bytes"], files[name]["xxh3"])
            facts = file_facts(path)
            if facts is None:
                return f"{name} is missing"
            if facts.size_bytes != wanted.size_bytes:
                return f"{name} has {facts.size_bytes:,} bytes instead of {wanted.size_bytes:,}"
            if FileFacts.of(_content(path)) != wanted:
                return f"the content of {name} is not what was written"
    except StorageError:
        raise
    except FileNotFoundError:
        return f"{name} is missing"
    except KeyError:
        return f"{STATE_NAME} lists no files"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
