"""The command's side of preparing: Ray where a shard is missing, the progress line, and Ctrl-C.

The main thread starts Ray, paints and takes signals; the pipeline runs in a thread of its own.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from nemo_ray import hub, session, urls
from nemo_ray.config.checks import store_urls
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.order import window_order
from nemo_ray.data.progress import PrepareDisplay
from nemo_ray.data.review import Prepared, Review, missing_windows, require_writable, survey
from nemo_ray.stored_run import open_run

INTERRUPTED = 130
_REPAINT_S = 0.2
_END_WITHIN_S = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The first Ctrl-C (or SIGTERM) raises KeyboardInterrupt in the main thread, the next ends at once."""

    def __init__(self) -> None:
        self._count = 0
        self._deferred = False
        self._ender: threading.Thread | None = None
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> "Interrupts":
        self._install()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal waits for the end of this."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            self._install()  # ray.init takes SIGTERM
        if self._count:
            raise KeyboardInterrupt

    def end_ray(self, within_s: float | None = None) -> None:
        """End Ray, in a thread of its own: a second signal that comes meanwhile does not cut it short.

        Waits for it, `within_s` at most.
        """
        if self._ender is None:
            self._ender = threading.Thread(target=session.shutdown, name="end of Ray", daemon=True)
            self._ender.start()
        self._ender.join(within_s)

    def _install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            self._end_at_once()
        if not self._deferred:
            raise KeyboardInterrupt

    def _end_at_once(self) -> None:
        """Leave the process now. Ray's own reaper ends what may still run of it then."""
        os.write(2, b"stopped at once\n")
        if "ray" in sys.modules:
            self.end_ray(_END_WITHIN_S)
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # a live line hides the cursor
        os._exit(INTERRUPTED)


def prepare_missing(
    plan: DataPlan, config: Config, console: Console, interrupts: Interrupts, verbose: bool = False
) -> Prepared | None:
    """Make the shards that are missing, and judge all; None where none was missing, and Ray was not needed.

    Raises DataError, ClusterError, or KeyboardInterrupt at a signal, when Ray has ended.
    """
    listing = open_run(config.output_dir).rejected_file
    found = survey(plan)
    if not missing_windows(found):
        review = Review(plan, config.max_rejected_share, listing=listing)
        review.add_existing(found)
        review.finish()
        return None
    require_writable(plan)
    with PrepareDisplay(console) as display:
        display.draw()
        with _ray(config, plan.directory, interrupts, verbose):
            pipeline = _Pipeline(plan, config, display)
            try:
                while not pipeline.wait(_REPAINT_S):
                    display.draw()
            except KeyboardInterrupt:
                pipeline.stop.set()
                logging.disable()  # Ray 2.60 logs tracebacks when it ends under a dataset, as it does now
                raise
            if pipeline.error is not None:
                raise pipeline.error
        return display.now


class _Pipeline:
    """The pipeline in its thread, and its error."""

    def __init__(self, plan: DataPlan, config: Config, display: PrepareDisplay) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._arguments = (plan, config, display)
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        from nemo_ray.data.pipeline import prepare  # imports Ray, which reads its environment then

        plan, config, display = self._arguments
        try:
            prepare(
                plan,
                config.data,
                hub.reference(config),
                order=window_order(plan, config.seed),
                stop=self.stop,
                progress=display.tell,
                listing=open_run(config.output_dir).rejected_file,
            )
        except BaseException as error:
            self.error = error


@contextmanager
def _ray(config: Config, directory: str, interrupts: Interrupts, verbose: bool) -> Iterator[None]:
    """A Ray of our own, or the cluster that the configuration names."""
    environment = session.Environment()
    try:
        with interrupts.deferred():  # half a Ray could not be ended
            address = session.address_to_join(config.ray, os.environ)
            if address is None:
                session.start_local(os.cpu_count() or 1, environment, verbose=verbose)
            else:
                stores = urls.variables_to_pass_on(store_urls(config), os.environ)
                hubs = hub.variables_to_pass_on(config, os.environ)
                session.connect(address, environment, {**hubs, **stores}, verbose)
                from nemo_ray.data.nodes import check_shared  # imports Ray

                check_shared({"dataset_prepared_path": directory})
        yield
    finally:
        interrupts.end_ray()
        environment.restore()


def stopped_line(plan: DataPlan) -> str:
    """What a stop leaves."""
    found = survey(plan)
    ready = len(found) - len(missing_windows(found))
    return f"stopped; {ready:,} of {len(found):,} windows are prepared, the same command goes on"
