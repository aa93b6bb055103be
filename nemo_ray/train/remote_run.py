"""The workers' side of a run in an object store: small things go through the driver's node, tensors directly.

What rank 0's trackers write as files lies in a folder on its own node and is copied from there.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ray.attempts import Attempt
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import join, remove_folder, upload
from nemo_ray.stored_run import PUSH_EVERY_S, RESULT_CONFIGS, FolderCopy, working_folder

Call = Callable[..., Any]
"""(name of a method of the actor, *arguments) -> its answer."""


class RemoteRunDir(RunDir):
    """The run directory as a worker has it; `path` is its own node's folder."""

    def __init__(self, url: str, call: Call) -> None:
        super().__init__(working_folder(url))
        self.url, self._call = url, call
        self._copy = FolderCopy(self.path, url)

    @property
    def place(self) -> str:
        return self.url

    def shown(self, path: Path) -> str:
        return join(self.url, *path.relative_to(self.path).parts)

    def _ask(self, method: str, *arguments: Any) -> Any:
        attempt = self.attempt.name if self.attempt is not None else None
        return self._call("call", attempt, method, arguments)

    def begin_attempt(self) -> Attempt:
        """On rank 0. The trackers' files of earlier starts may be of any age: they are made anew."""
        for folder in (self.tensorboard_dir, self.wandb_dir, self._results_dir):
            shutil.rmtree(folder, ignore_errors=True)
        self.attempt = Attempt((), self._call("begin_attempt"))  # its places are on the driver's node
        return self.attempt

    def check_attempt(self) -> None:
        self._ask("check_attempt")

    # -- run.json and trackers --------------------------------------------------------------------

    def read_run(self) -> dict[str, Any]:
        return dict(self._ask("read_run"))

    def read_failures(self) -> list[dict[str, Any]]:
        return list(self._ask("read_failures"))

    def update_run(self, facts: Mapping[str, Any]) -> None:
        self._ask("update_run", dict(facts))

    def add_notice(self, line: str) -> None:
        self._ask("add_notice", line)

    def read_trackers(self) -> dict[str, str]:
        return dict(self._ask("read_trackers"))

    def write_trackers(self, ids: Mapping[str, str]) -> None:
        self._ask("write_trackers", dict(ids))

    # -- rows -------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        self._ask("append_metrics", dict(row))
        if self._listener is not None:
            self._listener.log(row)

    def read_metrics(self) -> list[dict[str, Any]]:
        return list(self._ask("read_metrics"))

    def truncate_metrics(self, step: int) -> None:
        self._ask("truncate_metrics", step)

    def append_completion(self, row: Mapping[str, Any]) -> None:
        self._ask("append_completion", dict(row))

    def read_completions(self) -> list[dict[str, Any]]:
        return list(self._ask("read_completions"))

    # -- the trackers' files ----------------------------------------------------------------------

    @contextlib.contextmanager
    def keeping_tracker_files(self) -> Iterator[None]:
        remove_folder(self.shown(self.tensorboard_dir))
        ended = threading.Event()

        def push_often() -> None:
            while not ended.wait(PUSH_EVERY_S):
                with contextlib.suppress(OSError):  # the next one may go through
                    self._push_tracker_files()

        threading.Thread(target=push_often, name="push", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            try:
                self._push_tracker_files()
            except OSError as error:
                self.add_notice(f"the files of TensorBoard and W&B are not all in the store: {error}")

    def _push_tracker_files(self) -> None:
        folders = (self.tensorboard_dir, self.wandb_dir)
        self._copy.push([path for folder in folders for path in folder.rglob("*") if path.is_file()])

    # -- checkpoints ------------------------------------------------------------------------------

    def checkpoint_steps(self) -> list[int]:
        return list(self._ask("checkpoint_steps"))

    def checkpoint_place(self, step: int) -> str:
        return self.shown(self.checkpoint_dir(step))

    def checkpoint_aside(self, step: int) -> str:
        return self.checkpoint_place(step)

    @property
    def checkpoint_token(self) -> str:
        return self.own_attempt.name

    def publish_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        self._ask("publish_checkpoint", step, dict(state))

    def discard_checkpoint(self, step: int) -> None:
        self._ask("discard_checkpoint", step)

    def remove_checkpoint(self, step: int) -> None:
        self._ask("remove_checkpoint", step)

    def retire_checkpoint(self, step: int, why: str) -> str:
        return str(self._ask("retire_checkpoint", step, why))

    # -- what the run is for ----------------------------------------------------------------------

    @property
    def _results_dir(self) -> Path:
        return self.path / ".results"

    def result_aside(self, final: Path) -> Path:
        return self._results_dir / self.own_attempt.name / final.name

    def publish_result(self, final: Path) -> None:
        self.check_attempt()
        folder, config = self.result_aside(final), RESULT_CONFIGS[final.name]
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == config):
            place = join(self.shown(final), *path.relative_to(folder).parts)
            upload(path, place)
        shutil.rmtree(folder)
        self._ask("publish_result", final)

    # -- the rest ---------------------------------------------------------------------------------

    def append_error(self, who: str, text: str) -> None:
        self._ask("append_error", who, text)

    def write_nonfinite(self, step: int, rank: int, facts: Mapping[str, Any], keep: int) -> None:
        self._ask("write_nonfinite", step, rank, dict(facts), keep)

    def write_profile(self, trace: bytes, facts: Mapping[str, Any]) -> None:
        self._ask("write_profile", trace, dict(facts))

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        self._ask("write_progress", dict(progress))

    def stop_requested(self) -> bool:
        return bool(self._ask("stop_requested"))


def connect(url: str, service: Any) -> RemoteRunDir:
    """The run whose actor is `service`."""
    import ray
    from ray.exceptions import RayTaskError

    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(service, name).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from None

    return RemoteRunDir(url, call)
