"""URLs of object stores: their parts, what is wrong with them, and the variables that go with them.

Credentials come from the environment of the process, never from a URL. Imports nothing heavy, since
configurations are checked with it. How a store is reached is object_store.py's.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nemo_ray.errors import StorageError

S3_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_EC2_METADATA_DISABLED",
)
GCS_VARIABLES = ("GOOGLE_APPLICATION_CREDENTIALS",)
AZURE_VARIABLES = (
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
VARIABLES = {"s3": S3_VARIABLES, "gs": GCS_VARIABLES, "abfs": AZURE_VARIABLES}
"""By scheme, what a process that uses it reads from its environment."""

_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfs", "az": "abfs"}
ANONYMOUS = "anonymous"
_OPTIONS = re.compile(r"\?[^/]*=")


def is_url(path: str) -> bool:
    """Whether a path names an object store, as in `s3://bucket/key`."""
    return "://" in path


class Location(NamedTuple):
    """A URL in its parts."""

    scheme: str
    container: str
    """Bucket, or container of an Azure account."""
    key: str
    account: str | None
    anonymous: bool

    @property
    def inner(self) -> str:
        """The path within pyarrow's file system."""
        return f"{self.container}/{self.key}" if self.key else self.container


def redact(text: str) -> str:
    """`text` without what stands before the @ of a URL, or after its ?."""
    text = re.sub(r"\b(s3|gs|gcs)://[^/@\s]*:[^@\s]*@", r"\1://***@", text)  # AWS's keys may have a / in them
    text = re.sub(r"(\w+://)[^/@\s]*:[^/@\s]*@", r"\1***@", text)
    text = re.sub(rf"\b(s3|gs|gcs)://(?!{ANONYMOUS}@)[^/@\s]+@", r"\1://***@", text)
    text = re.sub(r"\b(https?://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(\w+://[^\s?]*)\?[^/\s]*=\S*", r"\1?***", text)


def url_problem(url: str) -> str | None:
    """Why a URL cannot be used, and what to give instead; None where it can. Asks no server."""
    name, _, rest = url.partition("://")
    authority = rest.split("/", 1)[0]
    user, at, container = authority.rpartition("@")
    if name not in _SCHEMES:
        return "is not an object store's; give s3://BUCKET/..., gs://BUCKET/... or abfs://CONTAINER/..."
    scheme = _SCHEMES[name]
    if ":" in user or (":" in authority and "@" in rest) or (at and scheme != "abfs" and user != ANONYMOUS):
        return (
            "holds credentials, which would be written to logs and run.json; remove them from the URL and "
            f"set {credential_variables(scheme)}"
        )
    if _OPTIONS.search(rest):
        return f"holds options after `?`; set environment variables instead ({', '.join(VARIABLES[scheme])})"
    if not container:
        return "names no bucket; write s3://BUCKET/KEY"
    if scheme == "abfs" and not at and "AZURE_STORAGE_ACCOUNT_NAME" not in os.environ:
        return (
            "names no storage account; write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/..., or set "
            "AZURE_STORAGE_ACCOUNT_NAME"
        )
    return None


def parse(url: str) -> Location:
    """The parts of a URL. Raises StorageError."""
    problem = url_problem(url)
    if problem is not None:
        raise StorageError(f"{redact(url)} {problem}")
    name, _, rest = url.partition("://")
    authority, _, key = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if _SCHEMES[name] != "abfs":
        return Location(_SCHEMES[name], host, key, None, anonymous=bool(at))
    if at:
        return Location("abfs", user, key, host.split(".")[0], anonymous=False)
    return Location("abfs", host, key, os.environ["AZURE_STORAGE_ACCOUNT_NAME"], anonymous=False)


def variables_to_pass_on(urls: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What processes on other nodes need in their environment to reach the stores of `urls`."""
    schemes = {parse(url).scheme for url in urls}
    return {name: environ[name] for scheme in schemes for name in VARIABLES[scheme] if name in environ}


def credential_variables(scheme: str) -> str:
    """The variables to set first, for messages."""
    if scheme == "s3":
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if scheme == "gs":
        return "GOOGLE_APPLICATION_CREDENTIALS"
    return "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
