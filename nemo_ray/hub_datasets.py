"""Datasets by their id on the Hugging Face hub: each node fetches one copy of the files that it reads.

Owns the listing of a repository at one commit and the way of its files to this node; hub_cache.py has the
transfer. Which files are wanted is data/hub_source.py's. Nothing of a repository is ever run.

A *reference* stands for a file wherever files are named, and is the same on every node:

    hub://datasets/owner/name@<commit>/data/train.parquet
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

_SCHEME = "hub://datasets/"
_REFERENCE = re.compile(rf"{_SCHEME}(?P<name>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{{40}})/(?P<file>.+)")


class Listing(NamedTuple):
    """What a dataset's repository holds at one commit. `card`: its README.md."""

    repository: Repository
    commit: str
    folder: Path
    files: tuple["RepoFile", ...]
    card: str

    def reference(self, file: str) -> str:
        """Names a file of it on every node."""
        return f"{_SCHEME}{self.repository.name}@{self.commit}/{file}"

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


def commit_of(path: str) -> str | None:
    """The commit in a reference; None for other paths."""
    match = _REFERENCE.fullmatch(path)
    return None if match is None else match["commit"]


def local_path(path: str) -> str:
    """Where a reference's file is on this machine, fetched first where it is missing. Other paths stay.

    Raises DataError.
    """
    match = _REFERENCE.fullmatch(path)
    if match is None:
        return path
    repository = _repository(match["name"], "datasets")
    place = cache_folder() / repository.folder_name / "snapshots" / match["commit"] / match["file"]
    if not place.exists():
        with explained(repository, match["commit"], DataError):
            listing = _listing(repository, match["commit"])
            _fetch(listing, [file for file in listing.files if file.path == match["file"]], lambda text: None)
    return str(place)
