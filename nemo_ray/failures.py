"""What went wrong, in one line: the cause inside the errors that Ray wraps around it. Imports no Ray.

Ray's wrappers are recognized by the attributes in which they keep what they wrap (Ray 2.60).
"""

import re
from collections.abc import Mapping, Sequence

from nemo_ray.errors import ClusterError, NemoRayError
from nemo_ray.urls import redact
from nemo_ray.visible import visible

_LINE_CHARACTERS = 400
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WRAPPED_IN = ("controller_failure", "health_check_failure", "cause", "_base_exc")
_CLASS = "class_name: "
_COLLATERAL = (
    "connection closed by peer",
    "connection reset by peer",
    "socket timeout",
    "timed out waiting",
    "nccl",
)


def root_cause(error: BaseException) -> BaseException:
    """The innermost error that explains `error`; of several workers', the one that the others followed."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = first_failure(failures) if isinstance(failures, Mapping) and failures else None
        for name in _WRAPPED_IN:
            wrapped = getattr(error, name, None)
            if inner is None and isinstance(wrapped, BaseException):
                inner = wrapped
        if inner is None:
            break
        error = inner
    return error


def first_failure(failures: Mapping[int, BaseException]) -> BaseException:
    """Of the errors of several ranks the one to show: ours, else one that is no echo of a lost peer."""

    def order(rank: int) -> tuple[int, int]:
        cause = root_cause(failures[rank])
        if isinstance(cause, NemoRayError):
            return 0, rank
        return (2 if is_echo(cause) else 1), rank

    return failures[min(failures, key=order)]


def is_echo(error: BaseException) -> bool:
    """Whether this is what a worker raises because another one is gone."""
    text = str(error).lower()
    module = type(error).__module__
    return (
        module.startswith("torch")
        and "dist" in type(error).__name__.lower()
        or any(words in text for words in _COLLATERAL)
    )


def is_lost_worker(error: BaseException) -> bool:
    """Whether a process or its node went away, so that a restart may go well."""
    cause = root_cause(error)
    return type(cause).__module__.startswith("ray.") or is_echo(cause)


def is_final(error: BaseException) -> bool:
    """Whether a restart would fail in the same way: an error of ours, unless it is about the cluster."""
    cause = root_cause(error)
    return isinstance(cause, NemoRayError) and not isinstance(cause, ClusterError)


def _lost_actor(message: Sequence[str]) -> str:
    """Whose process it was, by the class that Ray names below the first line of its message."""
    name = next((line.removeprefix(_CLASS) for line in message if line.startswith(_CLASS)), "")
    who = {
        "": "Ray's training controller, or a worker,",
        "TrainController": "Ray's training controller",
        "RayTrainWorker": "a training worker",
    }.get(name, f"Ray's actor {name}")
    return f"{who} was lost (killed, or out of memory): {''.join(message[:1])}"


def one_line(error: BaseException) -> str:
    """One line for the user: our own message, else type and first line."""
    cause = root_cause(error)
    if isinstance(cause, NemoRayError):
        return visible(redact(str(cause)))
    lines = [line.strip() for line in _ANSI.sub("", str(cause)).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if "creation task" in first:  # Ray ends its message with what it met there
        first = f"Ray could not start the run's processes: {lines[-1]}"
    elif type(cause).__name__ in ("RayActorError", "ActorDiedError"):
        first = _lost_actor(lines)
    else:
        first = f"{type(cause).__name__}: {first}" if first else type(cause).__name__
    first = redact(first)
    return first if len(first) <= _LINE_CHARACTERS else first[:_LINE_CHARACTERS] + "..."
