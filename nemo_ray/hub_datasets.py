"""Datasets by their id on the Hugging Face hub: each node fetches one copy of the files that it reads.

Owns the listing of a repository at one commit and the way of its files to this node; hub_cache.py has the
transfer. Which files are wanted is data/hub_source.py's. Nothing of a repository is ever run.

A *reference* stands for a file wherever files are named, and is the same on every node:

    hub://datasets/owner/name@<commit>/data/train.parquet   fetched once by each node that reads it
    hf://datasets/owner/name@<commit>/data/train.parquet    streamed: read by ranges (hub_stream.py)
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nemo_ray.errors import ConfigError, DataError
from nemo_ray.hub_cache import (
    Repository,
    Say,
    cache_folder,
    explained,
    fetch_blobs,
    no_bar,
    node_lock,
    require_room,
)

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_CARD = "README.md"
_ALWAYS_THERE = ".gitattributes"
"""huggingface_hub 2 warns where no file of a repository is asked for, and not every one has a card."""

_FETCHED, _STREAMED = "hub", "hf"
_REFERENCE = re.compile(
    rf"({_FETCHED}|{_STREAMED})://datasets/(?P<name>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{{40}})/(?P<file>.+)"
)


class Listing(NamedTuple):
    """What a dataset's repository holds at one commit. `card`: its README.md."""

    repository: Repository
    commit: str
    folder: Path
    files: tuple["RepoFile", ...]
    card: str

    def reference(self, file: str, streamed: bool) -> str:
        """Names a file of it on every node."""
        scheme = _STREAMED if streamed else _FETCHED
        return f"{scheme}://datasets/{self.repository.name}@{self.commit}/{file}"

    def known_as(self, file: "RepoFile") -> str:
        """What its content is known by."""
        return file.blob_id if file.lfs is None else file.lfs.sha256


def list_dataset(name: str, revision: str, key: str) -> Listing:
    """List a repository at a revision. Asks the hub unless it is offline. `key` names the entry in messages.

    Raises ConfigError.
    """
    repository = _repository(name, key)
    with explained(repository, revision, ConfigError):
        return _listing(repository, revision)


def _repository(name: str, key: str) -> Repository:
    return Repository(name, "dataset", f"{key}.path", f"{key}.revision")


def _listing(repository: Repository, revision: str) -> Listing:
    import huggingface_hub

    folder = _snapshot(repository, revision, [_CARD, _ALWAYS_THERE])
    files = huggingface_hub.get_cached_repo_tree(
        repository.name, repo_type=repository.kind, revision=folder.name
    )
    card = folder / _CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return Listing(repository, folder.name, folder, tuple(sorted(files, key=lambda file: file.path)), text)


def _snapshot(repository: Repository, revision: str, files: Sequence[str]) -> Path:
    """Make these files of a revision present; returns the folder, which is named by the commit."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in files],
            tqdm_class=no_bar(),
        )
    )


def fetch_files(listing: Listing, files: Sequence["RepoFile"], say: Say) -> None:
    """Bring files to this node's cache; goes on where it was broken off. Raises ConfigError."""
    with explained(listing.repository, listing.commit, ConfigError):
        _fetch(listing, files, say)


def _fetch(listing: Listing, files: Sequence["RepoFile"], say: Say) -> None:
    def missing() -> list["RepoFile"]:
        return [file for file in files if not (listing.folder / file.path).exists()]

    if not missing():
        return
    with node_lock(listing.repository, say):
        wanted = missing()  # another process may have fetched them
        if wanted:
            require_room(listing.repository, listing.folder, wanted)
            fetch_blobs(listing.repository, listing.folder, wanted, say)
            _snapshot(listing.repository, listing.commit, [file.path for file in wanted])


class Reference(NamedTuple):
    """The parts of one."""

    repository: Repository
    commit: str
    file: str


def reference_of(path: str) -> Reference | None:
    """The parts of a reference; None for other paths."""
    match = _REFERENCE.fullmatch(path)
    if match is None:
        return None
    return Reference(_repository(match["name"], "datasets"), match["commit"], match["file"])


def is_streamed(path: str) -> bool:
    """Whether a path is a reference to a file that is read where it lies."""
    return path.startswith(f"{_STREAMED}://") and reference_of(path) is not None


def local_path(path: str) -> str:
    """Where a reference's file is on this machine, fetched first where it is missing. Other paths stay, and
    so do references to what is streamed and not here.

    Raises DataError.
    """
    reference = reference_of(path)
    if reference is None:
        return path
    repository, commit, file = reference
    place = cache_folder() / repository.folder_name / "snapshots" / commit / file
    if not place.exists():
        if is_streamed(path):
            return path
        with explained(repository, commit, DataError):
            listing = _listing(repository, commit)
            _fetch(listing, [found for found in listing.files if found.path == file], lambda text: None)
    return str(place)
