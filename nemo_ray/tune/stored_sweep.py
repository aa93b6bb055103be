"""A sweep whose output_dir is the URL of an object store: a folder on the driver's node, and its copy there.

Trials are runs in the store (stored_run.py). Their processes are on the driver's node, and keep a trial's
folder there while its workers train anywhere: so the driver sees rows and progress as it does on a file
system. The store is the truth: a driver that starts makes its folders anew from it.
"""

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_ray.run_dir import STATE_NAME
from nemo_ray.storage import (
    download,
    join,
    list_files,
    list_folders,
    list_names,
    publish_bytes,
    read_bytes,
    remove,
    remove_folder,
    upload,
)
from nemo_ray.stored_run import RESULT_CONFIGS, StoredRunDir, working_folder
from nemo_ray.tune.sweep_dir import (
    POPULATION_NAME,
    SWEEP_NAME,
    TRIAL_NAME,
    TRIALS_NAME,
    SweepDir,
    TrialEnd,
    trial_name,
)
from nemo_ray.urls import is_url

_AT_ONCE = 16
"""Trials that are read beside each other."""


def open_sweep(output_dir: str) -> SweepDir:
    """The sweep of an output_dir, path or URL. Touches nothing."""
    return StoredSweepDir(output_dir) if is_url(output_dir) else SweepDir(output_dir)


class StoredSweepDir(SweepDir):
    """The same, for processes on the driver's node. `path` is that node's folder."""

    def __init__(self, url: str, folder: Path | None = None) -> None:
        """folder: for who only looks, another one than the sweep's own on this node."""
        super().__init__(folder or working_folder(url))
        self.url, self._looks = url.rstrip("/"), folder is not None

    @property
    def place(self) -> str:
        return self.url

    def shown(self, path: Path) -> str:
        return join(self.url, *path.relative_to(self.path).parts)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def trial_place(self, number: int) -> str:
        return join(self.url, TRIALS_NAME, trial_name(number))

    def trial(self, number: int) -> StoredRunDir:
        folder = self.trials_dir / trial_name(number) if self._looks else None
        return StoredRunDir(self.trial_place(number), folder)

    # -- between the folder and the store ---------------------------------------------------------

    def pull(self, numbers: Iterable[int] | None = None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name in list_names(self.url) | list_folders(self.url):
            if name in (SWEEP_NAME, POPULATION_NAME):
                (self.path / name).write_bytes(read_bytes(join(self.url, name)))
            elif not name.startswith("."):
                (self.path / name).touch()  # that it is there is told of
        for folder in (self.trials_dir, self.best_dir):
            folder.unlink(missing_ok=True)
        if numbers is None:
            numbers = range(len(self.read()["trials"])) if self.holds_sweep() else ()
        begun = list_folders(join(self.url, TRIALS_NAME))
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # small files, each a request
            list(pool.map(lambda number: self._pull_trial(number, trial_name(number) in begun), numbers))

    def _pull_trial(self, number: int, begun: bool) -> None:
        run = self.trial(number)
        if not begun:
            shutil.rmtree(run.path, ignore_errors=True)
            return
        run.pull()
        with contextlib.suppress(FileNotFoundError):
            (run.path / TRIAL_NAME).write_bytes(read_bytes(join(run.url, TRIAL_NAME)))

    def keep(self, path: Path) -> None:
        if path.exists():
            publish_bytes(self.shown(path), path.read_bytes())

    def clear(self) -> None:
        for number in range(len(self.read()["trials"])) if self.holds_sweep() else ():
            shutil.rmtree(self.trial(number).path, ignore_errors=True)
        remove(self.shown(self.population_file))
        remove_folder(join(self.url, TRIALS_NAME))
        remove_folder(self.shown(self.best_dir))
        for path in (self.report_file, self.sweep_json):
            remove(self.shown(path))
        super().clear()

    # -- trials -----------------------------------------------------------------------------------

    def write_end(self, end: TrialEnd) -> None:
        super().write_end(end)
        run = self.trial(end.number)
        # Without it in the store, a resumed sweep has the trial end once more: no reason to end this one.
        with contextlib.suppress(OSError):
            run.keep(run.path / TRIAL_NAME)

    def drop_checkpoints(self, number: int) -> None:
        run = self.trial(number)
        for step in run.checkpoint_steps():
            run.remove_checkpoint(step)

    def copy_checkpoint(self, source: int, number: int, step: int) -> None:
        theirs, run = self.trial(source).checkpoint_place(step), self.trial(number)
        for own in run.checkpoint_steps():
            if own >= step:
                run.remove_checkpoint(own)
        aside = self.path / ".taken-over"
        for file in list_files(theirs):
            name = file.removeprefix(f"{theirs}/")
            if name != STATE_NAME:
                download(file, aside)
                upload(aside, join(run.checkpoint_place(step), name))
        aside.unlink(missing_ok=True)
        state = run.checkpoint_dir(step) / STATE_NAME  # last: with it the checkpoint is complete
        publish_bytes(state, read_bytes(join(theirs, STATE_NAME)))
        run.keep(state)

    def publish_best(self, number: int, config: Mapping[str, Any]) -> Path:
        run = self.trial(number)
        for name in RESULT_CONFIGS:  # the driver's node has a part of it only
            for file in list_files(join(run.url, name)):
                download(file, run.path / file.removeprefix(f"{run.url}/"))
        best = super().publish_best(number, config)
        remove_folder(self.shown(best))
        for path in sorted(best.rglob("*")):
            if path.is_file():
                upload(path, self.shown(path))
        return best

    def fetch_best(self) -> None:
        """Copy best/ here, if it is there. Raises OSError."""
        for file in list_files(self.shown(self.best_dir)):
            download(file, self.path / file.removeprefix(f"{self.url}/"))
