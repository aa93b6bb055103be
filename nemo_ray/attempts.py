"""Numbered starts of a run's workers, of which only the newest can write.

Workers may live on for seconds after their driver was killed, or wake up after others took their place. So
every start takes the next number and a folder in `.attempts`, and removes the folders of those before it.
What a start publishes is written in its folder and renamed to its place: the rename of an older start finds
no source, at whatever moment it comes. Rows are appended to a file that each start replaces in this way: an
older start appends to one that has no name any more. What is published is run_dir.py's business.
"""

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from nemo_ray.errors import SupersededError
from nemo_ray.storage import publish_folder

_FOLDER = ".attempts"


@dataclass(frozen=True)
class Attempt:
    """One start, as its workers hold it. `name` is NUMBER-TOKEN: no two starts ever have the same."""

    root: Path
    name: str

    @classmethod
    def begin(cls, output_dir: Path) -> "Attempt":
        """Take the next number. From here on no earlier start publishes anything in `output_dir`."""
        root = output_dir / _FOLDER
        root.mkdir(parents=True, exist_ok=True)
        while True:
            newest = max(_starts(root), default=(0, ""))
            own = (newest[0] + 1, uuid.uuid4().hex[:12])
            attempt = cls(root, _name(own))
            attempt.folder.mkdir()
            others = [start for start in _starts(root) if start != own]
            for earlier in others:
                if earlier < own:
                    _remove(root / _name(earlier))
            if max(others, default=own) <= own:
                return attempt
            _remove(attempt.folder)  # others asked at the same moment, and one of them was ahead

    @property
    def folder(self) -> Path:
        """What this start may write is in here until it is published."""
        return self.root / self.name

    @property
    def number(self) -> int:
        """For people."""
        return int(self.name.partition("-")[0])

    def check(self) -> None:
        """Raises: SupersededError where a newer start took over."""
        if not self.folder.is_dir():
            raise SupersededError(
                f"{self.root.parent}: a newer start of this run took over; attempt {self.number} "
                "writes nothing any more"
            )

    def aside(self, name: str) -> Path:
        """Where a file or folder is written before it is published. `self.folder` must not be made anew."""
        return self.folder / name

    def publish(self, name: str, path: Path) -> None:
        """Give what was written aside its place, replacing what was there, if this is the newest start.

        Raises: SupersededError
        """
        source = self.aside(name)
        try:
            if source.is_dir():
                publish_folder(source, path)
            else:
                os.replace(source, path)
        except FileNotFoundError:
            self.check()
            raise


def _starts(root: Path) -> list[tuple[int, str]]:
    found = (name.partition("-") for name in os.listdir(root))
    return [(int(number), token) for number, _, token in found if number.isdigit()]


def _name(start: tuple[int, str]) -> str:
    return f"{start[0]}-{start[1]}"


def _remove(folder: Path) -> None:
    """Take the name away at once; what an older start still holds open may go later."""
    retired = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.replace(folder, retired)
    except FileNotFoundError:  # another start was faster
        return
    shutil.rmtree(retired, ignore_errors=True)
