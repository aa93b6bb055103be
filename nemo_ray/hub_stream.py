"""Files of the hub that are read where they lie, by ranges, without a copy here: `streaming: true`.

Named like the hub's other files, at one commit, but as hf://datasets/owner/name@<commit>/file, which is also
how fsspec calls them. What a name says is hub_datasets.py's.
"""

from functools import lru_cache
from http.client import PARTIAL_CONTENT
from typing import Any

from nemo_ray.errors import ConfigError, DataError
from nemo_ray.hub_cache import RefusedError, explained
from nemo_ray.hub_datasets import Listing, Reference, reference_of
from nemo_ray.ranges import RangeFile


@lru_cache(maxsize=4096)
def size_of(path: str) -> int:
    """Bytes of a file; asked for once in a process, since a commit does not change. Raises DataError."""
    from huggingface_hub import get_hf_file_metadata

    reference = _known(path)
    with explained(reference.repository, reference.commit, DataError):
        size = get_hf_file_metadata(_url(reference), retry_on_errors=True).size
        assert size is not None
        return size


def require_ranges(listing: Listing, file: str) -> None:
    """Ask for a file's first byte, so that what would fail on every node is told before the start.

    Raises: ConfigError
    """
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    repository = listing.repository
    url = _url(Reference(repository, listing.commit, file))
    with (
        explained(repository, listing.commit, ConfigError),
        http_stream_backoff("GET", url, **_asking_for(0, 1)) as response,
    ):
        hf_raise_for_status(response)
        if response.status_code != PARTIAL_CONTENT:
            raise RefusedError(
                f"{repository.key}: {repository.name} cannot be streamed: the hub, or a proxy before it, "
                "sends no parts of files; remove streaming"
            )


class HubFile(RangeFile):
    """A file of a dataset's repository. Raises DataError."""

    def __init__(self, path: str) -> None:
        super().__init__(size_of(path))
        self._path = path

    def read_range(self, start: int, count: int) -> bytes:
        """Asked for a few times, where the network or a busy server is at fault. Raises DataError."""
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        reference = _known(self._path)
        with explained(reference.repository, reference.commit, DataError):
            response = http_backoff("GET", _url(reference), **_asking_for(start, count))
            hf_raise_for_status(response)
        if len(response.content) != count:
            raise DataError(f"{self._path}: {len(response.content)} bytes came instead of {count}")
        return response.content


def _asking_for(start: int, count: int) -> dict[str, Any]:
    """Options of a request for some bytes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    # Compressed, a part of the file would not be a part of the transfer.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{start + count - 1}"
    return {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}


def _known(path: str) -> Reference:
    reference = reference_of(path)
    assert reference is not None, path
    return reference


def _url(reference: Reference) -> str:
    from huggingface_hub import hf_hub_url

    name, kind = reference.repository.name, reference.repository.kind
    return hf_hub_url(name, reference.file, repo_type=kind, revision=reference.commit)
