"""A job on a Ray cluster: its submission, its log, its exit code.

A name can be given again: its jobs are `name`, then `name-2`, `name-3`, each of which goes on where the one
before ended.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ray.errors import ClusterError, ConfigError

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
STOPPED_CODE = 130
REFUSED_CODE = 2
_ENDS_WITHIN_S = 60.0
_POLL_S = 0.5
_LOOKS = 20
"""In a row that may fail before the cluster counts as gone."""


@dataclass(frozen=True)
class Attempt:
    """A job that was found under a name."""

    id: str
    number: int
    status: str
    code: int | None = None
    """Of its command, where it is known."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ENDED

    @property
    def was_refused(self) -> bool:
        """Whether its command changed nothing: there is nothing of its own to go on with."""
        return self.code == REFUSED_CODE


class Jobs:
    """The job server of a cluster."""

    def __init__(self, address: str | None) -> None:
        """address: http://HOST:8265; None: what RAY_API_SERVER_ADDRESS or RAY_ADDRESS say, or this machine's.

        Raises: ClusterError where nobody answers.
        """
        from ray.job_submission import JobSubmissionClient

        for name in list(logging.root.manager.loggerDict):  # they tell of uploads and closed connections
            if name.split(".")[0] == "ray":
                logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"no Ray job server answers at {address or 'the default address'} ({said}); give --address="
                "http://HOST:8265, the dashboard of a running head"
            ) from error

    def newest(self, name: str) -> Attempt | None:
        """The newest job under a name; None where there is none. Raises: ClusterError."""
        found = []
        try:
            jobs = self._client.list_jobs()
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"the cluster does not list its jobs: {_first_line(str(error))}") from error
        for job in jobs:
            match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or "")
            if match:
                status, code = str(job.status.value), job.driver_exit_code
                found.append(Attempt(match[0], int(match[1] or 1), status, code))
        return max(found, key=lambda attempt: attempt.number, default=None)

    def submit(
        self, command: str, folder: Path, variables: Mapping[str, str], submission_id: str | None
    ) -> str:
        """Hand in a job with a copy of `folder` to work in; returns its id. Raises: ClusterError."""
        try:
            return str(
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(folder), "env_vars": dict(variables)},
                )
            )
        except (RuntimeError, ConnectionError, ValueError) as error:
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            raise ClusterError(
                f"the cluster does not take the job: {lines[-1] if lines else error}"
            ) from error

    def follow(self, job: str, write: Callable[[str], object]) -> int:
        """Pass its log on until it ends; returns its command's exit code, STOPPED_CODE where it was stopped.

        Raises: ClusterError where the cluster is gone.
        """
        failures, log = 0, _Log(write)
        while True:
            try:
                asyncio.run(self._tail(job, log))
                failures = 0
            except (RuntimeError, OSError) as error:  # the connection broke: the job need not have
                failures += 1
                self._give_up_after(failures, job, error)
            info = self._info(job)
            if str(info.status.value) in ENDED:
                return self._code(job)
            time.sleep(_POLL_S)

    async def _tail(self, job: str, log: "_Log") -> None:
        log.begin()
        async for text in self._client.tail_job_logs(job):
            log.take(text)

    def _code(self, job: str) -> int:
        """Of a job that has ended. Its code may be told a moment after its status."""
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while True:
            info = self._info(job)
            status = str(info.status.value)
            if status == "SUCCEEDED":
                return 0
            if status == "STOPPED":
                return STOPPED_CODE
            if info.driver_exit_code is not None:
                return int(info.driver_exit_code)
            if not (info.message or "").startswith("Job entrypoint command failed"):
                raise ClusterError(f"job {job} failed before its command ran: {_first_line(info.message)}")
            if time.monotonic() > deadline:
                return 1
            time.sleep(_POLL_S)

    def _info(self, job: str) -> Any:
        for failures in range(1, _LOOKS + 1):
            try:
                return self._client.get_job_info(job)
            except (RuntimeError, OSError) as error:
                self._give_up_after(failures, job, error)
        raise AssertionError("the last look returns or raises")

    def _give_up_after(self, failures: int, job: str, error: Exception) -> None:
        if failures >= _LOOKS:
            raise ClusterError(f"the cluster of job {job} does not answer any more: {error}") from error
        time.sleep(_POLL_S)


class _Log:
    """Writes a log once, though each connection brings it from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._written, self._seen = write, 0, 0

    def begin(self) -> None:
        """The log comes from its beginning now."""
        self._seen = 0

    def take(self, text: str) -> None:
        """The next part of it."""
        new = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        if new:
            self._write(new)
            self._written = self._seen


def next_id(name: str, newest: Attempt | None) -> str:
    """The id of the next job under a name."""
    return name if newest is None else f"{name}-{newest.number + 1}"


def check_name(name: str) -> None:
    """Raises: ConfigError for an id that would be taken for an attempt, or that a URL cannot have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or re.search(r"-\d+$", name):
        raise ConfigError(
            f"--id: {name!r} is not valid; give letters, digits, _, . and -, and no -NUMBER at its end"
        )


def _first_line(text: str | None) -> str:
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "no reason is known")
