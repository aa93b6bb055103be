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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_ray.errors import SupersededError
from nemo_ray.storage import publish_folder

_FOLDER = ".attempts"


@dataclass(frozen=True)
class Attempt:
    """One start, as its workers hold it. `name` is NUMBER-TOKEN: no two starts ever have the same."""

    places: tuple[Path, ...]
    name: str

    @classmethod
    def begin(cls, places: Sequence[Path]) -> "Attempt":
        """Take the next number. From here on no earlier start publishes anything in `places`: folders, each
        with what is written aside on its own file system."""
        for place in places:
            (place / _FOLDER).mkdir(parents=True, exist_ok=True)
        while True:
            newest = max((start for place in places for start in _starts(place)), default=(0, ""))
            own = (newest[0] + 1, uuid.uuid4().hex[:12])
            if all(_enter(place, own) for place in places):
                return cls(tuple(places), _name(own))
            for place in places:  # another asked at the same moment, and was ahead
                _remove(place, own)

    @property
    def number(self) -> int:
        """For people."""
        return int(self.name.partition("-")[0])

    def check(self) -> None:
        """Raises: SupersededError where a newer start took over."""
        for place in self.places:
            if not (place / _FOLDER / self.name).is_dir():
                raise SupersededError(
                    f"{self.places[0]}: a newer start of this run took over; attempt {self.number} writes "
                    "nothing any more"
                )

    def aside(self, path: Path) -> Path:
        """Where the file or folder `path`, which belongs into one of the places, is written before it is
        published. The folder around it must not be made anew."""
        assert path.parent in self.places
        return path.parent / _FOLDER / self.name / path.name

    def publish(self, path: Path) -> None:
        """Give what was written aside its name, replacing what was there, if this is the newest start.

        Raises: SupersededError
        """
        source = self.aside(path)
        try:
            if source.is_dir():
                publish_folder(source, path)
            else:
                os.replace(source, path)
        except FileNotFoundError:
            self.check()
            raise


def _enter(place: Path, own: tuple[int, str]) -> bool:
    """Make a start's folder and remove those of earlier ones; False where there is a later one."""
    (place / _FOLDER / _name(own)).mkdir()
    others = [start for start in _starts(place) if start != own]
    for earlier in others:
        if earlier < own:
            _remove(place, earlier)
    return max(others, default=own) <= own


def _starts(place: Path) -> list[tuple[int, str]]:
    found = (name.partition("-") for name in os.listdir(place / _FOLDER))
    return [(int(number), token) for number, _, token in found if number.isdigit()]


def _name(start: tuple[int, str]) -> str:
    return f"{start[0]}-{start[1]}"


def _remove(place: Path, start: tuple[int, str]) -> None:
    """Take the name away at once; what an older start still holds open may go later."""
    folder = place / _FOLDER / _name(start)
    retired = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.replace(folder, retired)
    except FileNotFoundError:  # never made, or another start was faster
        return
    shutil.rmtree(retired, ignore_errors=True)
