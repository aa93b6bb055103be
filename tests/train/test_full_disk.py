"""A disk without room is told as that, at once; it is no failure of a worker that a restart might mend."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from nemo_ray.errors import DiskError, StorageError
from nemo_ray.failures import is_final
from nemo_ray.train import full_disk
from nemo_ray.train.full_disk import told

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_of_the_run(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(full_disk.shutil, "disk_usage", lambda folder: left)
    with pytest.raises(DiskError) as raised, told(str(tmp_path)):
        raise OSError(code, os.strerror(code))
    assert is_final(raised.value)
    assert str(raised.value) == (
        f"output_dir: {tmp_path} could not be written: the disk is full (1.0 MiB free); make room, and "
        "go on with resume_from_checkpoint=auto"
    )


def test_another_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DiskError, match="^/elsewhere/a could not be written: No space left on device; make room"
        ),
        told("s3://bucket/run"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/a")
    for output_dir in (tmp_path, tmp_path / "not yet"):
        with pytest.raises(DiskError, match="^a file could not be written"), told(str(output_dir)):
            raise FULL


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), ValueError("no"), StorageError("s3: refused")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, told(str(tmp_path)):
        raise error
    assert raised.value is error
