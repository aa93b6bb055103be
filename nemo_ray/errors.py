"""The errors a user can meet. Each is one line that names key or file, value, rule and remedy.

They cross Ray's process boundaries, so they carry nothing but their message and survive pickling.
"""

import errno
import sys

from nemo_ray.visible import visible

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError says of a disk, or a share of it, that is full."""


class NemoRayError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""

    exit_code = 1


class ConfigError(NemoRayError):
    """The configuration, or a path it names, is wrong: nothing was started."""

    exit_code = 2


class DataError(NemoRayError):
    """A dataset, or a row of it, cannot be used."""


class StorageError(NemoRayError, OSError):
    """An object store refuses a request, or cannot be reached: the line names the URL and the remedy."""


class CheckpointError(NemoRayError):
    """A base model, adapter or training checkpoint cannot be read or written."""


class DiskError(NemoRayError):
    """A disk has no room left."""


class NonFiniteError(NemoRayError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class SupersededError(NemoRayError):
    """A newer start of the same run took over: this one must not write any more."""


class PatchError(NemoRayError):
    """The installed libraries do not fit the patches, or the patched model computes wrong values."""


class ClusterError(NemoRayError):
    """The Ray cluster cannot run this job: too few CPUs or GPUs, not reachable, or a worker was lost."""


class ReclaimedError(ClusterError):
    """A node is taken back by its owner: what was trained is saved, and the run goes on elsewhere."""


def tell(error: NemoRayError) -> int:
    """What a command does with such an error: a line each on standard error; returns the exit code."""
    for line in str(error).splitlines():
        print(f"error: {visible(line)}", file=sys.stderr)
    return error.exit_code
