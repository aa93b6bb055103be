"""The driver of a run: everything from a checked configuration to an exit code.

It owns the order of things, the messages and the end of the run. It imports no torch, and Ray only through
session.py and cluster.py.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nemo_ray import hub, session, urls
from nemo_ray.config.checks import store_urls
from nemo_ray.config.load import LoadedConfig
from nemo_ray.config.schema import Config, DataSection
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.order import window_order
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import ClusterError, NemoRayError
from nemo_ray.failures import one_line, root_cause
from nemo_ray.peft_config import check_adapter_dir
from nemo_ray.plan import estimate_memory
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import StoredRunDir, open_run
from nemo_ray.targets import expert_paths, find_targets, linear_paths, read_shape
from nemo_ray.train import cluster, full_disk, outputs, resources, summary
from nemo_ray.train.background import Background
from nemo_ray.train.best import check_metric
from nemo_ray.train.driver_lock import DriverLock
from nemo_ray.train.fit import check_fit, check_fits_here
from nemo_ray.train.interrupts import EXIT_CODE as INTERRUPTED
from nemo_ray.train.interrupts import Interrupts
from nemo_ray.train.progress import ProgressDisplay
from nemo_ray.train.room import wait_for_room
from nemo_ray.train.store_lock import StoreLock
from nemo_ray.train.trackers.setup import check_trackers, variables_to_pass_on

_POLL_S = 0.2
_END_AFTER_DATA_FAILED_S = 120.0
_DATA_ENDS_WITHIN_S = 5.0


def prepare_data(
    plan: DataPlan, config: Config, stop: threading.Event, progress: Callable[[int, int], None]
) -> None:
    """Make the missing shards in the order in which training will ask for them."""
    from nemo_ray.data.pipeline import prepare

    prepare(
        plan,
        config.data,
        hub.reference(config),
        order=window_order(plan, config.seed),
        num_cpus=resources.DATA_TASK_CPUS,
        stop=stop,
        progress=lambda now: progress(now.windows, now.num_windows),
        listing=open_run(config.output_dir).rejected_file,
    )


def driver_lock(run: RunDir, job_id: str | None, say: Callable[[str], None]) -> DriverLock | StoreLock:
    """The lock of a run's directory, wherever that is."""
    if isinstance(run, StoredRunDir):
        return StoreLock(run.url, job_id, say)
    return DriverLock(run.path, job_id, say)


def check_nodes(config: Config) -> None:
    """Raises ClusterError unless all nodes see what the others write where the run writes."""
    from nemo_ray.data.nodes import check_shared

    assert config.dataset_prepared_path is not None  # resolve_paths has filled it in
    check_shared({"output_dir": config.output_dir, "dataset_prepared_path": config.dataset_prepared_path})


@dataclass(frozen=True)
class Parts:
    """The work that a launch orders; tests hand in their own."""

    plan: Callable[[DataSection, str, str], DataPlan] = plan_data
    prepare: Callable[[DataPlan, Config, threading.Event, Callable[[int, int], None]], None] = prepare_data
    worker: cluster.WorkerFunction | None = None
    """What runs on each worker; None is train.worker.train_worker."""


def run(loaded: LoadedConfig, force: bool = False, verbose: bool = False) -> int:
    """Train as configured; returns the exit code: 0, 1 failed, 2 refused, 130 stopped by a signal.

    force: also where no GPU of the cluster can hold it, by the estimate.
    verbose: with all that Ray and the workers log.
    """
    return Launch(loaded, Parts(), force, verbose).run()


class Launch:
    """One run from the driver's side. Use once."""

    def __init__(
        self, loaded: LoadedConfig, parts: Parts, force: bool = False, verbose: bool = False
    ) -> None:
        self.notices, self.parts, self.force, self.verbose = loaded.notices, parts, force, verbose
        self.job_id = outputs.submission_id(os.environ)
        self.config = outputs.resolve_paths(loaded.config, self.job_id is not None, Path.cwd())
        self.run_dir = open_run(self.config.output_dir)
        self.console = Console(highlight=False)
        self.errors = Console(stderr=True, highlight=False)
        self.lock = driver_lock(self.run_dir, self.job_id, self.say)
        self.environment = session.Environment()
        self.stop_data = threading.Event()
        self.data: Background | None = None
        self.interrupts = Interrupts(lambda: self._end(INTERRUPTED))
        self.started_s = time.monotonic()
        self.begun = self.stopped = False
        self.failed_with: str | None = None
        self.error: Exception | None = None
        """What it failed by."""
        self._ending = threading.Lock()

    def run(self) -> int:
        """Do it all; every way out ends Ray and says in one line what happened."""
        code = 1
        with self.interrupts:
            try:
                with full_disk.told(self.run_dir.place):
                    code = self._run()
            except KeyboardInterrupt:
                code = INTERRUPTED
                newest = self._newest_checkpoint() if self.begun else None
                self.say(f"stopped; newest checkpoint: {newest or 'none, training had not begun'}")
            except Exception as error:
                code = self._fail(error)
            finally:
                self._end(code)
        return code

    def _newest_checkpoint(self) -> str | None:
        newest = self.run_dir.newest_checkpoint()
        return self.run_dir.shown(newest) if newest is not None else None

    def say(self, text: str) -> None:
        """One line to the user."""
        self.console.print(Text(text), soft_wrap=True)

    # -- the order of things ---------------------------------------------------------------------

    def _run(self) -> int:
        asked, run = self.config, self.run_dir
        self.say(f"output: {run.place}")
        self.lock.claim()
        run.pull()
        start = outputs.decide_start(run, asked)
        check_trackers(asked.tracking, os.environ)
        address = session.address_to_join(asked.ray, os.environ)
        resources.require_num_workers(asked.ray, connected=address is not None)
        revision = outputs.base_revision(asked, start)
        config = hub.pin(asked, revision, weights=not asked.reinit_weights, here=address is None)
        config = outputs.keep_dataset_commits(config, start)
        self.config, model = config, hub.reference(config)
        shape = read_shape(str(hub.local_folder(model, weights=False)))
        if config.adapter:  # a name that matches nothing is told before a run is replaced
            find_targets(config.adapter_config, linear_paths(shape), expert_paths(shape))
            if config.lora_model_dir:
                check_adapter_dir(config.adapter_config, shape)
        plan = self.plan = self.parts.plan(config.data, model, config.dataset_prepared_path or "")
        check_metric(config.train, plan)
        if start.checkpoint is not None:
            outputs.check_plan(run, plan)
            outputs.check_best(run, config.train, start.checkpoint)
        wanted, beside = self._enter_ray(address, shape)
        self.interrupts.collect()
        self.lock.check()
        outputs.begin(run, start, plan)
        self.begun = True
        commit = config.revision_of_model if hub.is_reference(model) else None
        outputs.record_run(run, outputs.run_facts(asked, plan, wanted.num_workers, self.job_id, commit))
        where = f"the Ray cluster at {address}" if address else "a Ray of its own on this machine"
        self._print_plan(plan, shape, wanted, where, start)
        self._train(plan, wanted, beside)
        self.lock.check()
        run.push()
        if self.interrupts.count or self.stopped:
            newest = self._newest_checkpoint()
            if newest is None:
                self.say("stopped; there is no checkpoint to go on from")
            else:
                self.say(f"stopped; go on with resume_from_checkpoint=auto (newest checkpoint: {newest})")
            return INTERRUPTED
        self.console.print()
        summary.print_completions(self.console, run)
        summary.print_rows(self.console, summary.result_rows(run, time.monotonic() - self.started_s))
        return 0

    def _enter_ray(self, address: str | None, shape: Mapping[str, Any]) -> tuple[resources.Demand, bool]:
        """Start or join Ray. Returns the workers' demand, and whether data is prepared beside them."""
        section = self.config.ray
        if address is None:
            wanted = resources.demand(self.config, resources.gpus_here(os.environ))
            if not self.force:
                check_fits_here(self.config, shape, wanted)
            session.start_local(resources.local_cpus(wanted), self.environment, verbose=self.verbose)
            nodes = session.nodes()
            beside = resources.place(wanted, nodes, section.accelerator_type)
        else:
            session.connect(address, self.environment, self._variables_to_pass_on(), self.verbose)
            wanted = resources.demand(self.config, sum(node.get("GPU", 0.0) for node in session.nodes()))
            room = wanted, section.accelerator_type, section.wait_for_nodes_s
            beside = wait_for_room(*room, session.nodes, self.say)
            nodes = session.nodes()
            if len(nodes) > 1:
                check_nodes(self.config)
        if not self.force:
            check_fit(self.config, shape, wanted, nodes)
        return wanted, beside

    def _variables_to_pass_on(self) -> dict[str, str]:
        """What processes on other nodes need to reach the hub, the object stores and trackers."""
        stores = urls.variables_to_pass_on(store_urls(self.config), os.environ)
        trackers = variables_to_pass_on(self.config.tracking, os.environ)
        return {**hub.variables_to_pass_on(self.config, os.environ), **stores, **trackers}

    def _print_plan(
        self,
        plan: DataPlan,
        shape: Mapping[str, Any],
        wanted: resources.Demand,
        where: str,
        start: outputs.Start,
    ) -> None:
        config = self.config
        _, shard = resources.mesh(wanted.num_workers, config.dp_shard_size, config.dp_replicate_size)
        whole = resources.layout_is_open(config, wanted.use_gpu)
        memory = estimate_memory(config, shape, 1 if whole else shard, wanted.use_gpu)
        rows = [
            ("model", hub.reference(config)),
            ("", summary.describe_model(shape)),
            ("adapter", summary.describe_adapter(config)),
            *summary.describe_data(config, plan, wanted.num_workers),
            ("prepared", plan.directory),
            ("workers", summary.describe_workers(wanted, config, where)),
            ("memory", summary.describe_memory(memory)),
        ]
        if start.checkpoint is not None:
            rows.append(("resumes", self.run_dir.shown(start.checkpoint)))
        summary.print_rows(self.console, rows)
        for notice in (*self.notices, *plan.notices):
            self.say(f"note: {notice}")

    def _train(self, plan: DataPlan, wanted: resources.Demand, beside: bool) -> None:
        """Prepare data and train; returns when the workers ended well, or after a signal."""
        config, run = self.config, self.run_dir
        with ProgressDisplay(self.console, run, live=self.console.is_terminal) as display:
            data = self.data = Background(
                "data", lambda: self.parts.prepare(plan, config, self.stop_data, display.data)
            )
            if not beside:
                display.stage("preparing data")
                display.say("note: the workers take all CPUs, so all data is prepared before they start")
                self._watch(display, data, data)
                if data.error is not None:
                    raise data.error
            display.stage(f"starting {wanted.num_workers} worker{'s' if wanted.num_workers > 1 else ''}")
            self.environment.add(cluster.environment(wanted))
            loop_config = {"config": config, "plan": plan, "output_dir": run.place}
            fit = Background(
                "fit",
                lambda: cluster.fit(
                    self.parts.worker, loop_config, run, wanted, config.ray, self.lock.me, self.verbose
                ),
            )
            self._watch(display, fit, data)
        if self.interrupts.count:
            if fit.error is not None:
                self._tell(fit.error)
        elif data.error is not None or fit.error is not None:
            raise data.error or fit.error or AssertionError("one of them is there")
        elif isinstance(fit.result, Mapping) and fit.result.get("stopped"):
            self.stopped = True  # by a stop file that somebody else put there

    def _watch(self, display: ProgressDisplay, work: Background, data: Background) -> None:
        """Show progress until `work` has ended; pass a signal, or the end of the data, on to the workers."""
        stopping = data_told = False
        give_up_s = float("inf")
        while not work.wait(_POLL_S):
            with contextlib.suppress(OSError):  # a hiccup of the file system is no reason to end a run
                self.lock.check()
                display.poll()
            if self.interrupts.count and not stopping:
                if display.nothing_to_save:
                    raise KeyboardInterrupt
                stopping = True
                self.run_dir.request_stop()
                display.say("stopping: saving a checkpoint (again to stop at once)")
            if not data_told and data.wait(0):
                data_told = True
                for line in summary.data_lines(self.plan, self.run_dir) if data.error is None else ():
                    display.say(line)
            if data.error is not None and not stopping:
                stopping = True
                self.run_dir.request_stop()
                give_up_s = time.monotonic() + _END_AFTER_DATA_FAILED_S
            if time.monotonic() > give_up_s:
                return
        display.poll()

    # -- ends ------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> int:
        """Say in one line what went wrong and return the exit code."""
        self.error = error
        self._tell(error)
        cause = root_cause(error)
        return cause.exit_code if isinstance(cause, NemoRayError) else 1

    def _tell(self, error: BaseException) -> None:
        cause = root_cause(error)
        line = self.failed_with = one_line(error)
        if self.begun and self.lock.holds():
            who = "driver" if cause is error else "driver, about a worker"
            text = "".join(traceback.format_exception(error))
            self.run_dir.append_error(who, text)
            if not isinstance(cause, NemoRayError) or isinstance(cause, ClusterError):
                line += f" (full traceback: {self.run_dir.shown(self.run_dir.error_file)})"
        elif not isinstance(cause, NemoRayError):
            self.errors.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
        for part in line.splitlines():
            self.errors.print(Text(f"error: {part}"), soft_wrap=True)

    def _end(self, code: int) -> None:
        """End the data pipeline and Ray: at every end, and at a second signal while the first is served."""
        if not self._ending.acquire(blocking=False):
            return
        self.stop_data.set()
        if self.data is not None:  # Ray 2.60 ends a process with code 1 where a thread still asks for it
            self.data.wait(_DATA_ENDS_WITHIN_S)
        if "ray" in sys.modules:
            session.shutdown()
        self.environment.restore()
        self._record_end(code)
        self.lock.release()

    def _record_end(self, code: int) -> None:
        """Note how it ended; a run that recorded nothing leaves nothing for a next one to stumble over, and
        one that was taken over leaves everything as it is."""
        run = self.run_dir
        if not self.begun or not self.lock.holds():
            return
        failures = run.read_failures()
        shutil.rmtree(run.ray_dir, ignore_errors=True)
        run.stop_file.unlink(missing_ok=True)
        outcome = {0: "finished", INTERRUPTED: "stopped"}.get(code, "failed")
        facts = {"outcome": outcome, "ended_at": datetime.now(UTC).isoformat(timespec="seconds")}
        facts |= {"failures": failures, "error": self.failed_with}
        with contextlib.suppress(OSError):  # a full disk, or a store that is away, has been told of already
            if code != 0 and not run.has_trained():
                run.clear(keep=(run.error_file, run.rejected_file))
            else:
                run.update_run(facts)
            run.push()
