"""Object stores: one connection for each bucket, requests that are tried again, errors of one line.

Owns how S3, Google Cloud Storage and Azure are reached through pyarrow. What is read and written is
storage.py's, what a URL says urls.py's.
"""

import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

from pyarrow import fs

from nemo_ray.errors import StorageError
from nemo_ray.urls import (
    ANONYMOUS,
    VARIABLES,
    Location,
    credential_variables,
    is_url,
    parse,
    redact,
    url_problem,
)

CLIENT_ATTEMPTS = 3
"""That the S3 client makes of each request by itself."""
ATTEMPTS = 5
"""That are made on top of the client libraries' own."""
FIRST_PAUSE_S = 0.5
"""Between the first two attempts; doubled from one to the next."""
LONGEST_PAUSE_S = 4.0
PATIENCE_S = 120.0
"""For which a store may be away that has answered this process before."""
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 20.0
"""For which a transfer may stand still."""

T = TypeVar("T")

_answered: set[tuple[str, str]] = set()
"""Stores that this process has reached, as its connections are kept: the others may have a wrong address."""


# -- connections ----------------------------------------------------------------------------------


def connect(location: Location, *, large: bool = False) -> fs.FileSystem:
    """The process's file system for a location. `large`: for writing objects of several parts."""
    environ = tuple((name, os.environ[name]) for name in VARIABLES[location.scheme] if name in os.environ)
    return _connect(location.scheme, location.container, location.account, location.anonymous, large, environ)


@lru_cache(maxsize=32)
def _connect(
    scheme: str,
    container: str,
    account: str | None,
    anonymous: bool,
    large: bool,
    environ: tuple[tuple[str, str], ...],
) -> fs.FileSystem:
    """One a bucket, so that one region, or one account, is one client; `environ` is what it was made with."""
    given = dict(environ)
    if scheme == "gs":
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=REQUEST_TIMEOUT_S))
    if scheme == "abfs":
        key = given.get("AZURE_STORAGE_ACCOUNT_KEY")
        sas = None if key else given.get("AZURE_STORAGE_SAS_TOKEN")
        return fs.AzureFileSystem(account_name=account, account_key=key, sas_token=sas)
    return fs.S3FileSystem(
        anonymous=anonymous,
        endpoint_override=given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL"),
        region=given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS),
        # A delayed open writes a small object in one request instead of three. Where the request that begins
        # an object of several parts fails, pyarrow 26 leaves an empty object behind: not for large ones.
        allow_delayed_open=not large,
    )


def attempt(url: str, doing: str, work: Callable[[fs.FileSystem, str], T], *, large: bool = False) -> T:
    """`work(file system, path)`, again where a request failed in a way that may pass.

    `doing`: what it does, for the message, such as "reading".
    Raises: FileNotFoundError as it comes; StorageError.
    """
    location = parse(url)
    store = location.scheme, location.container
    began_s, number = time.monotonic(), 0
    while True:
        number += 1
        try:
            found = work(connect(location, large=large), location.inner)
            _answered.add(store)
            return found
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            if str(error).startswith(_NOT_THERE):
                raise FileNotFoundError(f"{redact(url)}: {error}") from None
            passes, explanation = _diagnose(str(error), location)
            patient = store in _answered and time.monotonic() - began_s < PATIENCE_S
            if not passes or (number >= ATTEMPTS and not patient):
                tries = f" {number} times" if number > 1 else ""
                raise StorageError(f"{redact(url)}: {doing} failed{tries}: {explanation}") from None
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) * random.uniform(0.5, 1.0))


def expect_answers(path: str) -> None:
    """Another process of this run has reached the store of `path`, if that is in one: be patient with it."""
    if is_url(path) and url_problem(path) is None:  # hub:// is no store
        location = parse(path)
        _answered.add((location.scheme, location.container))


def no_bucket(url: str, doing: str) -> StorageError:
    """The error of a URL whose bucket is not there."""
    return StorageError(f"{redact(url)}: {doing} failed: {_no_bucket(parse(url))}")


# -- what went wrong ------------------------------------------------------------------------------

_NOT_THERE = ("No such file or directory", "No such directory")
"""What pyarrow 26 says of a folder of Google Cloud Storage that is not there, by an OSError without errno."""

_NO_BUCKET = (
    "NO_SUCH_BUCKET",
    "NoSuchBucket",
    "ContainerNotFound",
    "bucket does not exist",
    "container does not",
)
_DENIED = (
    "ACCESS_DENIED",
    "AccessDenied",
    "HTTP status 403",
    "HTTP status 401",
    "PERMISSION_DENIED",
    "Permission denied",
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
)
_BAD_CREDENTIALS = (
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "SIGNATURE_DOES_NOT_MATCH",
    "SignatureDoesNotMatch",
    "INVALID_CLIENT_TOKEN_ID",
    "EXPIRED_TOKEN",
    "ExpiredToken",
    "UNAUTHENTICATED",
    "Could not create a OAuth2 access token",
    "AuthenticationFailed",
    "credential",
)
_ELSEWHERE = ("PermanentRedirect", "HTTP status 301", "AuthorizationHeaderMalformed")
_NOT_REACHED = ("curlCode: 6,", "curlCode: 7,", "Could not resolve", "Could not connect", "Couldn't connect")


def _diagnose(text: str, location: Location) -> tuple[bool, str]:
    """Whether a failure may pass, and what happened with its remedy."""

    def says(words: tuple[str, ...]) -> bool:
        return any(word in text for word in words)

    variables = credential_variables(location.scheme)
    if says(_NO_BUCKET):
        return False, _no_bucket(location)
    if says(_BAD_CREDENTIALS):
        return False, f"the credentials are not accepted ({_short(text)}); set {variables} again"
    if says(_DENIED):
        if location.anonymous:
            return False, f"access denied without credentials; remove anonymous@ and set {variables}"
        missing = not any(name in os.environ for name in VARIABLES[location.scheme] if "KEY" in name)
        if location.scheme == "s3" and missing:
            return False, (
                f"access denied, and no AWS_ACCESS_KEY_ID is set in this process; set {variables}, give the "
                f"node a role, or read a public bucket as s3://{ANONYMOUS}@{location.container}/..."
            )
        return False, f"access denied; give these credentials the right to it, or set others ({variables})"
    if says(_ELSEWHERE):
        return False, f"bucket {location.container} is in another region; set AWS_REGION"
    if says(_NOT_REACHED):
        where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        host = f"{redact(where)} (AWS_ENDPOINT_URL)" if location.scheme == "s3" and where else "its host"
        return True, f"{host} cannot be reached; is the address right, and the network up?"
    return True, f"{_short(text)}; it may pass: start again later"


def _no_bucket(location: Location) -> str:
    return f"there is no bucket {location.container}; create it, or correct the URL"


def _short(text: str) -> str:
    """The part of a client's message that says what happened, in one line."""
    text = re.sub(r"\s*\(Request ID: \S+\)", "", " ".join(text.split()))
    _, _, after = text.partition("AWS Error ")
    return redact(after or text)[:200].rstrip(" .:")
