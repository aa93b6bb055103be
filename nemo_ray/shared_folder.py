"""Do all nodes see the same folder? Each writes a token there, and looks for those of the others.

Knows no Ray: who runs these functions on which node is the caller's business. A folder may be a URL.
"""

import contextlib
import os
import time
from collections.abc import Sequence

from nemo_ray.storage import absolute, join, list_names, publish_bytes, remove
from nemo_ray.urls import is_url

_POLL_S = 0.2


def write_token(folder: str, check: str, node: str) -> None:
    """Leave a node's token. `check` names this check among others. Raises OSError."""
    publish_bytes(join(_place(folder, check), node), b"")


def missing_tokens(folder: str, check: str, nodes: Sequence[str], within_s: float) -> list[str]:
    """The nodes whose tokens are not seen here; a network file system may show them late. Raises OSError."""
    deadline = time.monotonic() + within_s
    while True:
        seen = list_names(_place(folder, check))
        missing = [node for node in nodes if node not in seen]
        if not missing or time.monotonic() >= deadline:
            return missing
        time.sleep(_POLL_S)


def remove_tokens(folder: str, check: str) -> None:
    """Remove what is seen of the tokens; a folder that does not let them go does no harm."""
    place = _place(folder, check)
    with contextlib.suppress(OSError):
        for name in list_names(place):
            remove(join(place, name))
        if not is_url(place):
            os.rmdir(place)


def _place(folder: str, check: str) -> str:
    return join(absolute(folder), f".nodes-{check}")


def not_shared(key: str, folder: str, blind: str, unseen: str) -> str:
    """The line for the user: `blind` does not see what `unseen` wrote."""
    remedy = (
        "set ray.storage_path, or the key itself, to a folder that all nodes mount"
        if key == "output_dir"
        else "set dataset_prepared_path to a folder that all nodes mount, or to an object store (s3://...), "
        "or ray.storage_path to such a folder"
    )
    return (
        f"{key}: {folder} is not shared: node {blind} does not see what node {unseen} wrote there; {remedy}"
    )
