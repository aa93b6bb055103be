"""The driver of a sweep: from a checked sweep to an exit code. It owns the order of things and the messages.

Data is prepared once, before the trials; all trials share it.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nemo_ray import hub, session, urls
from nemo_ray.config.checks import store_urls
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import ConfigError, NemoRayError
from nemo_ray.failures import one_line, root_cause
from nemo_ray.run_dir import RunDir
from nemo_ray.targets import expert_paths, find_targets, linear_paths, read_shape
from nemo_ray.train import outputs, resources, summary
from nemo_ray.train.background import Background
from nemo_ray.train.best import check_metric
from nemo_ray.train.driver_lock import DriverLock
from nemo_ray.train.interrupts import EXIT_CODE as INTERRUPTED
from nemo_ray.train.interrupts import Interrupts
from nemo_ray.train.launch import check_nodes, prepare_data
from nemo_ray.tune.course import Course
from nemo_ray.tune.sweep import Sweep, Trial
from nemo_ray.tune.sweep_dir import BEST_NAME, CONFIG_NAME, SweepDir, trial_name
from nemo_ray.tune.table import SweepDisplay, describe, table
from nemo_ray.tune.trial import DRIVER_CPUS, STOPPED, Shared

_POLL_S = 0.3
_LOG_WIDTH = 160
_NOTE_EVERY_S = 30.0
BY_SIGNAL = "stopped"


def run(sweep: Sweep, resume: bool) -> int:
    """Run or continue a sweep; returns the exit code: 0, 1 no trial finished, 2 refused, 130 stopped."""
    return SweepLaunch(sweep, resume).run()


class SweepLaunch:
    """One start of a sweep from the driver's side. Use once."""

    def __init__(self, sweep: Sweep, resume: bool) -> None:
        self.sweep, self.resume = sweep, resume
        self.job_id = outputs.submission_id(os.environ)
        base = outputs.resolve_paths(sweep.base.config, self.job_id is not None, Path.cwd())
        if urls.is_url(base.output_dir):
            raise ConfigError(f"output_dir: {base.output_dir}: a sweep is kept in a folder; give one")
        self.config = base
        self.folder = SweepDir(base.output_dir)
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
        self.errors = Console(stderr=True, highlight=False)
        self.lock = DriverLock(self.folder.path, self.job_id, self.say)
        self.environment = session.Environment()
        self.stop_data = threading.Event()
        self.interrupts = Interrupts(lambda: self._end(INTERRUPTED))
        self.began_s = self.noted_s = time.monotonic()
        self.work: list[Background] = []
        self.begun = False
        self._ending = threading.Lock()

    def say(self, text: str) -> None:
        """One line to the user."""
        self.console.print(Text(text), soft_wrap=True)

    def run(self) -> int:
        """Do it all; every way out ends Ray and says in one line what happened."""
        code = 1
        with self.interrupts:
            try:
                code = self._run()
            except KeyboardInterrupt:
                self.say("stopped before a trial had begun")
                code = INTERRUPTED
            except Exception as error:
                code = self._fail(error)
            finally:
                self._end(code)
        return code

    # -- the order of things ---------------------------------------------------------------------

    def _run(self) -> int:
        self.say(f"output: {self.folder.path}")
        self.lock.claim()
        earlier_s = self._check_folder()
        config, section = self.config, self.sweep.section
        address = session.address_to_join(config.ray, os.environ)
        resources.require_num_workers(config.ray, connected=address is not None)
        config = self.config = hub.pin(config, weights=not config.reinit_weights, here=address is None)
        model = hub.reference(config)
        shape = read_shape(str(hub.local_folder(model, weights=False)))
        plan = plan_data(config.data, model, config.dataset_prepared_path or "")
        metric = config.train.model_copy(update={"metric_for_best_model": section.metric})
        if not plan.eval_windows:
            raise ConfigError(
                "tune.metric: no rows are held out to evaluate; set val_set_size or test_datasets"
            )
        check_metric(metric, plan)
        if self.resume and self.folder.read()["data_fingerprint"] != plan.fingerprint:
            raise ConfigError(
                f"output_dir: the data of the sweep in {self.folder.path} changed since it began; restore "
                "its files and data keys, or name another output_dir"
            )
        trials = {trial.number: self._trial_config(trial) for trial in self.sweep.trials}
        check_targets(trials, shape)
        points = {trial.number: trial.point for trial in self.sweep.trials}
        course = Course(self.folder, trials, section.metric, section.mode, section.scheduler == "asha")
        if self.resume:
            course.restore()
            if not course.left():
                self.say("all trials are done")
                return self._conclude(course, points, earlier_s)
        wanted, at_once = self._enter_ray(address)
        self.interrupts.collect()
        self.lock.check()
        if not self.resume:
            self.folder.clear()
        self.folder.write(self._facts(plan, earlier_s))
        self.begun = True
        where = f"the Ray cluster at {address}" if address else "a Ray of its own on this machine"
        self._print_plan(plan, shape, course, at_once, wanted, where)
        shared = Shared(trials, plan, wanted, section.metric, self.job_id)
        with SweepDisplay(self.console, course, points) as display:
            self._prepare(plan, display)
            if not self.interrupts.count:
                self._train(course, shared, at_once, display, earlier_s)
        return self._conclude(course, points, earlier_s)

    def _check_folder(self) -> float:
        """Seconds that earlier starts of this sweep took. Raises ConfigError where it may not begin."""
        path, folder = self.folder.path, self.folder
        if self.resume:
            if not folder.holds_sweep():
                raise ConfigError(f"output_dir: {path} holds no sweep to resume; leave out --resume")
            began = folder.read()
            if began["trials"] != self._points():
                raise ConfigError(
                    f"output_dir: the sweep in {path} has other trials than this configuration makes; "
                    "restore its tune section, or name another output_dir"
                )
            return float(began["elapsed_s"])
        if folder.holds_sweep() and not self.config.overwrite:
            raise ConfigError(
                f"output_dir: {path} already holds a sweep; continue it with --resume, replace it with "
                "overwrite=true, or name another output_dir"
            )
        foreign = [] if folder.holds_sweep() else folder.foreign_entries()
        if foreign:
            raise ConfigError(
                f"output_dir: {path} is not the folder of a sweep (it holds {', '.join(foreign[:3])}); "
                "name another output_dir"
            )
        return 0.0

    def _points(self) -> list[dict[str, Any]]:
        return [dict(trial.point) for trial in self.sweep.trials]

    def _facts(self, plan: DataPlan, earlier_s: float) -> dict[str, Any]:
        run = outputs.run_facts(self.config, plan, 0, self.job_id)
        kept = ("config", "versions", "git_revision", "data_fingerprint", "submission_id", "started_at")
        return {
            **{name: run[name] for name in kept},
            "tune": self.sweep.section.model_dump(mode="json"),
            "trials": self._points(),
            "elapsed_s": earlier_s,
        }

    def _trial_config(self, trial: Trial) -> Config:
        """As for an ordinary run, in the sweep's folder, with the data that all share."""
        update = {
            "output_dir": str(self.folder.trials_dir / trial_name(trial.number)),
            "resume_from_checkpoint": "auto",
            "overwrite": False,
        }
        shared = ("base_model", "revision_of_model", "dataset_prepared_path", "datasets", "test_datasets")
        shared += ("chat_template", "lora_model_dir", "mlflow_tracking_uri")
        update |= {name: getattr(self.config, name) for name in shared}
        return trial.config.model_copy(update=update)

    def _enter_ray(self, address: str | None) -> tuple[resources.Demand, int]:
        """Start or join Ray. Returns one trial's demand, and how many trials fit beside each other."""
        config, asked = self.config, self.sweep.section.max_concurrent
        most = min(len(self.sweep.trials), asked or len(self.sweep.trials))
        if address is None:
            wanted = resources.demand(config, resources.gpus_here(os.environ))
            # One more, of which the trials' own processes take their parts.
            session.start_local(resources.local_cpus(wanted) + 1, self.environment)
        else:
            stores = urls.variables_to_pass_on(store_urls(config), os.environ)
            session.connect(
                address, self.environment, {**hub.variables_to_pass_on(config, os.environ), **stores}
            )
        nodes = session.nodes()
        if address is not None:
            if len(nodes) > 1:
                check_nodes(config)
            wanted = resources.demand(config, sum(node.get("GPU", 0.0) for node in nodes))
        resources.place(wanted, nodes, config.ray.accelerator_type)  # one fits, or it says what does not
        return wanted, most_at_once(wanted, nodes, config.ray.accelerator_type, most)

    def _print_plan(
        self,
        plan: DataPlan,
        shape: Any,
        course: Course,
        at_once: int,
        wanted: resources.Demand,
        where: str,
    ) -> None:
        section, config = self.sweep.section, self.config
        done = len(course.numbers) - len(course.left())
        rows = [
            ("model", hub.reference(config)),
            ("", summary.describe_model(shape)),
            *summary.describe_data(config, plan, wanted.num_workers),
            ("prepared", plan.directory),
            (
                "trials",
                f"{len(course.numbers)}, {at_once} at a time" + (f"; {done} are done" if done else ""),
            ),
            ("judged by", f"{section.mode} {section.metric}, scheduler {section.scheduler}"),
            ("workers", f"for each trial {summary.describe_workers(wanted, config, where)}"),
        ]
        summary.print_rows(self.console, rows)
        for notice in (*self.sweep.base.notices, *plan.notices):
            self.say(f"note: {notice}")

    def _prepare(self, plan: DataPlan, display: SweepDisplay) -> None:
        """All shards, before the first trial."""
        data = Background(
            "data", lambda: prepare_data(plan, self.config, self.stop_data, lambda done, total: None)
        )
        self.work.append(data)
        while not data.wait(_POLL_S):
            self.lock.check()
            if self.interrupts.count:
                raise KeyboardInterrupt
        if data.error is not None:
            raise data.error
        for line in summary.data_lines(plan, RunDir(self.folder.path)):
            display.say(line)

    def _train(
        self, course: Course, shared: Shared, at_once: int, display: SweepDisplay, earlier_s: float
    ) -> None:
        from nemo_ray.tune import runner

        fit = Background("tune", lambda: runner.fit(course, shared, course.left(), at_once))
        while not fit.wait(_POLL_S):
            with contextlib.suppress(OSError):  # a hiccup of the file system is no reason to end a sweep
                self.lock.check()
                display.poll()
            if self.interrupts.count and not course.closed:
                course.close(BY_SIGNAL)
                display.say("stopping: the trials save a checkpoint (again to stop at once)")
            self._check_budget(course, display, earlier_s)
            self._note_time(earlier_s)
            course.ask()
        display.poll()
        if fit.error is not None:
            raise fit.error

    def _note_time(self, earlier_s: float) -> None:
        """For a start that comes after this one was killed."""
        now_s = time.monotonic()
        if now_s - self.noted_s >= _NOTE_EVERY_S:
            self.noted_s = now_s
            with contextlib.suppress(OSError):
                self.folder.write({**self.folder.read(), "elapsed_s": earlier_s + now_s - self.began_s})

    def _check_budget(self, course: Course, display: SweepDisplay, earlier_s: float) -> None:
        section = self.sweep.section
        if course.closed:
            return
        hours = (earlier_s + time.monotonic() - self.began_s) / 3600
        if section.max_hours is not None and hours >= section.max_hours:
            course.close(f"tune.max_hours: {section.max_hours:g} are over")
        elif section.max_tokens is not None and tokens_of(course) >= section.max_tokens:
            course.close(f"tune.max_tokens: {section.max_tokens:,} are trained")
        if course.closed:
            display.say(f"{course.closed}: the trials save a checkpoint and end")

    # -- ends ------------------------------------------------------------------------------------

    def _conclude(self, course: Course, points: dict[int, Any], earlier_s: float) -> int:
        """The best trial's result in best/, the table, and the exit code."""
        self.lock.check()
        section, best = self.sweep.section, course.best()
        left = course.left()
        if section.keep_pruned_checkpoints is False:
            for number, end in course.ends.items():
                if end.status == STOPPED:
                    shutil.rmtree(course.run(number).checkpoints_dir, ignore_errors=True)
        facts = self.folder.read()
        elapsed_s = earlier_s + time.monotonic() - self.began_s
        if best is not None:
            config = {**facts["config"], **points[best], "output_dir": f"{self.folder.path}-{BEST_NAME}"}
            self.folder.publish_best(
                best, {name: value for name, value in config.items() if value is not None}
            )
        facts |= {
            "best": best,
            "outcome": "finished" if not left else "stopped",
            "why": course.closed,
            "elapsed_s": elapsed_s,
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.folder.write(facts)
        self.console.print()
        self.console.print(table(course, points))
        self.console.print()
        if best is not None:
            end = course.ends[best]
            rows = [
                ("best", f"trial {best}: {section.metric} {end.value:.4f} with {describe(points[best])}"),
                ("result", str(self.folder.best_dir)),
                ("configuration", str(self.folder.best_dir / CONFIG_NAME)),
                ("time", summary.duration(elapsed_s)),
            ]
            summary.print_rows(self.console, rows)
        if self.interrupts.count:
            self.say(f"stopped with {summary.plural(len(left), 'trial')} to go; go on with --resume")
            return INTERRUPTED
        if course.closed:
            self.errors.print(Text(f"error: {course.closed}"), soft_wrap=True)
        elif best is None:
            self.errors.print(Text("error: no trial came to its end; the table says why"), soft_wrap=True)
        return 0 if best is not None else 1

    def _fail(self, error: BaseException) -> int:
        cause = root_cause(error)
        if not isinstance(cause, NemoRayError):
            self.errors.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
        for line in one_line(error).splitlines():
            self.errors.print(Text(f"error: {line}"), soft_wrap=True)
        return cause.exit_code if isinstance(cause, NemoRayError) else 1

    def _end(self, code: int) -> None:
        """End the data pipeline and Ray: at every end, and at a second signal while the first is served."""
        if not self._ending.acquire(blocking=False):
            return
        self.stop_data.set()
        for work in self.work:
            work.wait(5.0)
        if "ray" in sys.modules:
            session.shutdown()
        self.environment.restore()
        if self.begun and self.lock.holds():
            shutil.rmtree(self.folder.ray_dir, ignore_errors=True)
        self.lock.release()


def check_targets(trials: Mapping[int, Config], shape: Mapping[str, Any]) -> None:
    """Raises ConfigError where a trial's LoRA names match nothing in the model."""
    for number, config in trials.items():
        if config.adapter:
            try:
                find_targets(config.adapter_config, linear_paths(shape), expert_paths(shape))
            except ConfigError as error:
                raise ConfigError(f"trial {number}: {error}") from None


def tokens_of(course: Course) -> int:
    """Tokens that all trials have trained."""
    rows = (row for number in course.numbers for row in course.run(number).read_metrics())
    return sum(row.get("tokens", 0) for row in rows)


def most_at_once(
    wanted: resources.Demand, nodes: list[dict[str, float]], accelerator_type: str | None, most: int
) -> int:
    """How many trials fit on the cluster beside each other, up to `most`; 1 at least.

    A trial's own process takes DRIVER_CPUS more than its workers, which Tune does not count.
    """
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    for count in range(most, 1, -1):
        together = replace(wanted, num_workers=count * wanted.num_workers, at_least=None)
        if together.worker_cpus + count * DRIVER_CPUS > total_cpus:
            continue
        with contextlib.suppress(NemoRayError):
            resources.place(together, nodes, accelerator_type)
            return count
    return 1
