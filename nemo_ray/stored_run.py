"""A run whose output_dir is the URL of an object store: a folder on the driver's node, and its copy there.

    on the driver's node             in the store
    run.json, metrics.jsonl, ...     the same, written again every 30 s, at each checkpoint and at the end
    checkpoints/step-N/state.json    all files of the checkpoint, written by the workers, state.json last
    adapter/ | model/  its config    all its files, written by rank 0, the config last
    (nothing)                        tensorboard/, wandb/ from rank 0; prepared/ from the data tasks

The store is the truth: a driver that starts makes its folder anew from it. Workers know the folder by
train/remote_run.py only.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash

from nemo_ray.errors import ConfigError
from nemo_ray.run_dir import PREPARED_NAME, STATE_NAME, RunDir
from nemo_ray.storage import (
    download,
    join,
    list_folders,
    list_names,
    publish_bytes,
    publish_folder,
    publish_json,
    read_bytes,
    remove,
    remove_folder,
)
from nemo_ray.urls import is_url, redact

PUSH_EVERY_S = 30.0
RESULT_CONFIGS = {"adapter": "adapter_config.json", "model": "config.json"}
"""By folder, the file that is written last: with it the result is whole."""
_ONLY_THERE = (PREPARED_NAME, "tensorboard", "wandb")


def open_run(output_dir: str) -> RunDir:
    """The run of an output_dir, path or URL. Touches nothing."""
    return StoredRunDir(output_dir) if is_url(output_dir) else RunDir(output_dir)


def prepared_place(output_dir: str) -> str:
    """The path or URL of a run's own prepared shards."""
    return join(output_dir, PREPARED_NAME) if is_url(output_dir) else str(RunDir(output_dir).prepared_dir)


def working_folder(url: str) -> Path:
    """Where a node keeps what it has of a run in a store."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = url.rstrip("/")
    return cache / "nemo_ray" / f"{name.rsplit('/', 1)[1]}-{xxhash.xxh3_64_hexdigest(name.encode())}"


class FolderCopy:
    """Files of a folder, copied to a store when they changed. One thread at a time."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._copied: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def push(self, files: Collection[Path]) -> None:
        """Copy what changed, and remove what was copied and is no longer among `files`. Raises OSError."""
        with self._lock:
            found = {}
            for path in files:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                name = path.relative_to(self._folder).as_posix()
                found[name] = status.st_ino, status.st_size, status.st_mtime_ns
                if self._copied.get(name) != found[name]:
                    publish_bytes(join(self._url, name), path.read_bytes())
                    self._copied[name] = found[name]
            for name in self._copied.keys() - found.keys():
                remove(join(self._url, name))
                del self._copied[name]


class StoredRunDir(RunDir):
    """The same, for processes on the driver's node. `path` is that node's folder."""

    def __init__(self, url: str, folder: Path | None = None) -> None:
        """folder: for who only looks, another one than the run's own on this node."""
        super().__init__(folder or working_folder(url))
        self.url = url.rstrip("/")
        self._copy = FolderCopy(self.path, self.url)

    def __reduce__(self) -> tuple[type["StoredRunDir"], tuple[str]]:
        return StoredRunDir, (self.url,)

    @property
    def place(self) -> str:
        return self.url

    def shown(self, path: Path) -> str:
        return join(self.url, *path.relative_to(self.path).parts)

    # -- between the folder and the store ---------------------------------------------------------

    def pull(self) -> None:
        """Make the folder anew from the store. Raises OSError."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may want to say something there
        for name in list_names(self.url):
            if name.startswith("."):
                continue
            # What no run writes is worth its name only: it is told of, and never copied back.
            content = b"" if self._is_foreign(name) else read_bytes(join(self.url, name))
            (self.path / name).write_bytes(content)
        for name in list_folders(self.url):
            if name == self.checkpoints_dir.name:
                self._pull_checkpoints()
            elif name in RESULT_CONFIGS:
                self._pull_file(Path(name) / RESULT_CONFIGS[name])
            elif name == self.nonfinite_dir.name:
                for file in list_names(join(self.url, name)):
                    self._pull_file(Path(name) / file)
            elif name not in _ONLY_THERE:
                (self.path / name).mkdir()

    def _pull_checkpoints(self) -> None:
        for name in list_folders(join(self.url, self.checkpoints_dir.name)):
            self._pull_file(Path(self.checkpoints_dir.name) / name / STATE_NAME)

    def _pull_file(self, name: Path) -> None:
        try:
            content = read_bytes(join(self.url, *name.parts))
        except FileNotFoundError:
            return
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content)

    def push(self) -> None:
        """Copy what changed in the folder since. Raises OSError."""
        listed = [path for path in self._owned() if path.is_file() and path != self.stop_file]
        listed += [path for path in (self.data_page,) if path.is_file()]
        self._copy.push([*listed, *self.nonfinite_dir.glob("*.json")])

    def keep(self, path: Path) -> None:
        publish_bytes(self.shown(path), path.read_bytes())

    def clear(self, keep: Collection[Path] = ()) -> None:
        for step in self.checkpoint_steps():
            self.remove_checkpoint(step)
        super().clear(keep)
        for path in self._owned():
            if path in keep:
                continue
            if path.suffix:
                remove(self.shown(path))
            else:
                remove_folder(self.shown(path), first=RESULT_CONFIGS.get(path.name, STATE_NAME))

    # -- checkpoints ------------------------------------------------------------------------------

    def checkpoint_place(self, step: int) -> str:
        return self.shown(self.checkpoint_dir(step))

    def checkpoint_aside(self, step: int) -> str:
        return self.checkpoint_place(step)  # its files have names of their own: see checkpoint_token

    @property
    def checkpoint_token(self) -> str:
        return self.own_attempt.name

    def publish_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """The rows up to it come first: a run that goes on from it has them."""
        self.check_attempt()
        self.push()
        publish_json(join(self.checkpoint_place(step), STATE_NAME), dict(state))
        publish_json(self.checkpoint_dir(step) / STATE_NAME, dict(state))

    def discard_checkpoint(self, step: int) -> None:
        if step not in self.checkpoint_steps():
            remove_folder(self.checkpoint_place(step), first=STATE_NAME)

    def remove_checkpoint(self, step: int) -> None:
        super().remove_checkpoint(step)
        remove_folder(self.checkpoint_place(step), first=STATE_NAME)

    def retire_checkpoint(self, step: int, why: str) -> str:
        state = join(self.checkpoint_place(step), STATE_NAME)
        content = read_bytes(state)
        name = super().retire_checkpoint(step, why)
        publish_bytes(join(self.checkpoint_place(step), f"{name}.json"), content)
        remove(state)
        return f"{self.checkpoint_place(step)}/{name}.json"

    # -- what the run is for ----------------------------------------------------------------------

    def publish_result(self, final: Path) -> None:
        """Note what rank 0 has written to the store. Raises SupersededError."""
        self.check_attempt()
        self._pull_file(Path(final.name) / RESULT_CONFIGS[final.name])


def fetch_result(url: str, argument: str) -> str:
    """A folder here with what lies at a URL: a run with its result alone, or an adapter or model itself.

    Args:
        argument: of the command line, that gave the URL.

    Raises: ConfigError where there is no such thing, StorageError.
    """
    names = list_names(url)
    files: list[tuple[str, ...]] = [(name,) for name in names]
    if not names & set(RESULT_CONFIGS.values()):
        found = RESULT_CONFIGS.keys() & list_folders(url)
        if not found:
            reason = "its run has not ended yet" if "run.json" in names else "it is neither a run nor one"
            raise ConfigError(f"{argument}: {redact(url)} holds no adapter and no model: {reason}")
        files = [("run.json",)] if "run.json" in names else []
        files += [(folder, name) for folder in found for name in list_names(join(url, folder))]
    place = working_folder(url)
    final, partial = place.with_name(f"{place.name}-result"), place.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        for parts in files:
            download(join(url, *parts), partial.joinpath(*parts))
        publish_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(final)
