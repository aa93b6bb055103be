"""The driver of a sweep: from a checked sweep to an exit code. It owns the order of things and the messages.

Data is prepared once, before the trials; all trials share it.
"""

import contextlib
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping
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
from nemo_ray.stored_run import open_run
from nemo_ray.targets import read_shape
from nemo_ray.train import outputs, resources, summary
from nemo_ray.train.background import Background
from nemo_ray.train.best import check_metric
from nemo_ray.train.interrupts import EXIT_CODE as INTERRUPTED
from nemo_ray.train.interrupts import Interrupts
from nemo_ray.train.launch import check_nodes, driver_lock, prepare_data
from nemo_ray.train.room import wait_for_room
from nemo_ray.train.trackers.setup import check_trackers
from nemo_ray.train.trackers.setup import variables_to_pass_on as trackers_variables
from nemo_ray.tune import setup, words
from nemo_ray.tune.budget import Budget
from nemo_ray.tune.course import Course
from nemo_ray.tune.generations import Generations
from nemo_ray.tune.groups import Parent
from nemo_ray.tune.load import Sweep, Trial
from nemo_ray.tune.report import write_report
from nemo_ray.tune.shards import Shard
from nemo_ray.tune.source import Begun, Known, Proposed, Source, recall
from nemo_ray.tune.stored_sweep import open_sweep
from nemo_ray.tune.sweep_dir import BEST_NAME
from nemo_ray.tune.table import SweepDisplay
from nemo_ray.tune.trial import STOPPED, Shared

_POLL_S = 0.3
_LOG_WIDTH = 160
_NOTE_EVERY_S = 30.0
_DATA_ENDS_WITHIN_S = 5.0
BY_SIGNAL = "stopped"


def run(sweep: Sweep, resume: bool, shard: Shard, verbose: bool = False) -> int:
    """Run or continue a sweep, or a part of it; returns the exit code: 0, 1 no trial finished, 2 refused,
    130 stopped."""
    return SweepLaunch(sweep, resume, shard, verbose).run()


class SweepLaunch:
    """One start of a sweep from the driver's side. Use once."""

    def __init__(self, sweep: Sweep, resume: bool, shard: Shard, verbose: bool = False) -> None:
        self.sweep, self.resume, self.shard, self.verbose = sweep, resume, shard, verbose
        self.numbers = shard.numbers(sweep.num_trials)
        self.job_id = outputs.submission_id(os.environ)
        self.config = outputs.resolve_paths(sweep.base.config, self.job_id is not None, Path.cwd())
        self.folder = open_sweep(self.config.output_dir)
        self.own = open_run(self.config.output_dir)
        """For the small files that a sweep has as a run has them."""
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
        self.errors = Console(stderr=True, highlight=False)
        self.lock = driver_lock(self.own, self.job_id, self.say)
        self.environment = session.Environment()
        self.stop_data = threading.Event()
        self.data: Background | None = None
        self.parent: Parent | None = None
        self.interrupts = Interrupts(lambda: self._end())
        self.points = {trial.number: trial.point for trial in sweep.trials if trial.number in self.numbers}
        self.begun = self.unreported = False
        self.outcome = "failed"
        self.error: Exception | None = None
        """What it ended with, where that was no end of its trials."""
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
                self.error = error
                code = self._fail(error)
            finally:
                self._end()
        return code

    # -- the order of things ---------------------------------------------------------------------

    def _run(self) -> int:
        self.say(f"output: {self.folder.place}")
        self.lock.claim()
        self.folder.pull(self.numbers)
        earlier: dict[str, Any] = {}
        if self.resume:
            earlier = setup.read_earlier(self.folder, self.sweep, self.shard)
        else:
            setup.check_free(self.folder, self.config.overwrite)
        section = self.sweep.section
        check_trackers(self.config.tracking, os.environ)
        address = session.address_to_join(self.config.ray, os.environ)
        resources.require_num_workers(self.config.ray, connected=address is not None)
        weights = not self.config.reinit_weights
        config = self.config = hub.pin(self.config, weights=weights, here=address is None)
        model = hub.reference(config)
        shape = read_shape(str(hub.local_folder(model, weights=False)))
        for trial in (*self.sweep.trials, *self.sweep.probes):
            self._whole(trial, shape)
        plan = plan_data(config.data, model, config.dataset_prepared_path or "")
        self._check_plan(plan, earlier)
        course = Course(self.folder, self.numbers, section.metric, section.mode, section.scheduler)
        num_trials = self.sweep.num_trials
        if self.resume:
            now = self.folder.points(earlier["trials"])
            self.points |= {n: point for n in self.numbers if (point := now[n]) is not None}
            course.restore()
            if not self.sweep.trials:
                recall(self.sweep, course, self.points, earlier["lag"])
            if not course.left():
                self.say("all trials are done")
                gpus_per_trial = max(earlier.get("trial_gpus", ()), default=0.0)
                return self._conclude(course, Budget(section, earlier, num_trials, gpus_per_trial))
        wanted, at_once = self._enter_ray(address)
        gpus_per_trial = wanted.num_workers * wanted.per_worker.get("GPU", 0.0)
        if section.max_cost is not None and not gpus_per_trial:
            raise ConfigError("tune.max_cost: the trials use no GPU, which alone has a price; remove it")
        budget = Budget(section, earlier, num_trials, gpus_per_trial)
        self.interrupts.collect()
        self.lock.check()
        if not self.resume:
            self.folder.clear()
        facts = setup.facts(self.sweep, self.shard, config, plan, self.job_id)
        facts["started_at"] = earlier.get("started_at", facts["started_at"])
        facts["lag"] = earlier.get("lag", at_once)
        self.parent = Parent(config.tracking, self.folder.name, earlier.get("mlflow_run_id"), self.say)
        self.parent.begin()
        facts["mlflow_run_id"] = self.parent.run_id
        self.folder.write({**facts, **self._facts(budget)})
        self.begun = True
        where = f"the Ray cluster at {address}" if address else "a Ray of its own on this machine"
        told = words.Told(config, self.sweep, self.shard, wanted, at_once, where)
        words.print_plan(self.console, told, plan, shape, course)
        with SweepDisplay(self.console, course, self.points) as display:
            self._prepare(plan, display)
            if not self.interrupts.count:
                shared = Shared(plan, wanted, section.metric, self.job_id, self.verbose)
                source = self._source(course, shape, facts["lag"], display)
                self._train(course, shared, source, at_once, display, budget)
        return self._conclude(course, budget)

    def _whole(self, trial: Trial, shape: Mapping[str, Any]) -> Config:
        """A trial's configuration with what all share. Raises ConfigError where it does not fit the model."""
        found = setup.trial_config(trial, self.config, self.folder)
        setup.check_targets(trial.number, found, shape)
        if self.parent is not None and self.parent.run_id is not None:
            found = found.model_copy(update={"mlflow_parent_run_id": self.parent.run_id})
        return found

    def _source(self, course: Course, shape: Mapping[str, Any], lag: int, display: SweepDisplay) -> Source:
        def finish(trial: Trial) -> Config:
            return self._whole(trial, shape)

        if self.sweep.section.scheduler == "pbt":
            return Generations(self.sweep, course, self.points, finish, display.say)
        if not self.sweep.trials:
            return Proposed(self.sweep, course, self.points, lag, finish)
        left = (self.sweep.trials[number] for number in course.left())
        return Known(Begun(trial.number, finish(trial)) for trial in left)

    def _facts(self, budget: Budget) -> dict[str, Any]:
        """What of sweep.json changes while it runs."""
        # Those of a population change: population.json says how.
        known = {} if self.sweep.section.scheduler == "pbt" else self.points
        return {**budget.facts(), "trials": setup.points(self.sweep, known)}

    def _check_plan(self, plan: DataPlan, earlier: Mapping[str, Any]) -> None:
        if not plan.eval_windows:
            raise ConfigError(
                "tune.metric: no rows are held out to compare trials by; set val_set_size or test_datasets"
            )
        metric = self.sweep.section.metric
        try:
            check_metric(self.config.train.model_copy(update={"metric_for_best_model": metric}), plan)
        except ConfigError as error:
            raise ConfigError(str(error).replace("metric_for_best_model", "tune.metric", 1)) from None
        if earlier:
            setup.check_data(self.folder, earlier, plan)

    def _enter_ray(self, address: str | None) -> tuple[resources.Demand, int]:
        """Start or join Ray. Returns one trial's demand, and how many trials fit beside each other."""
        config, asked = self.config, self.sweep.section.max_concurrent
        if address is None:
            wanted = resources.demand(config, resources.gpus_here(os.environ))
            # One more, of which the trials' own processes take their parts.
            cpus = resources.local_cpus(wanted) + 1
            session.start_local(cpus, self.environment, verbose=self.verbose)
            nodes = session.nodes()
            resources.place(wanted, nodes, config.ray.accelerator_type)
        else:
            variables = urls.variables_to_pass_on(store_urls(config), os.environ)
            variables |= hub.variables_to_pass_on(config, os.environ)
            variables |= trackers_variables(config.tracking, os.environ)
            session.connect(address, self.environment, variables, self.verbose)
            wanted = resources.demand(config, sum(node.get("GPU", 0.0) for node in session.nodes()))
            section = config.ray  # one trial fits, or it says what does not
            wait_for_room(wanted, section.accelerator_type, section.wait_for_nodes_s, session.nodes, self.say)
            nodes = session.nodes()
            if len(nodes) > 1:
                check_nodes(config)
        most = min(len(self.numbers), asked or len(self.numbers))
        return wanted, setup.most_at_once(wanted, nodes, config.ray.accelerator_type, most)

    def _prepare(self, plan: DataPlan, display: SweepDisplay) -> None:
        """All shards, before the first trial."""
        data = self.data = Background(
            "data", lambda: prepare_data(plan, self.config, self.stop_data, lambda done, total: None)
        )
        while not data.wait(_POLL_S):
            self.lock.check()
            if self.interrupts.count:
                raise KeyboardInterrupt
        if data.error is not None:
            raise data.error
        self.folder.keep(self.own.rejected_file)
        for line in summary.data_lines(plan, self.own):
            display.say(line)

    def _train(
        self,
        course: Course,
        shared: Shared,
        source: Source,
        at_once: int,
        display: SweepDisplay,
        budget: Budget,
    ) -> None:
        from nemo_ray.tune import runner

        noted_s = 0.0
        fit = Background("tune", lambda: runner.fit(course, shared, source, at_once))
        while not fit.wait(_POLL_S):
            with contextlib.suppress(OSError):  # a hiccup of the file system is no reason to end a sweep
                self.lock.check()
                display.poll()
                budget.count(set(course.running))
                if not course.closed:
                    self._close_where_due(course, display, budget)
                course.ask()
                if budget.elapsed_s - noted_s >= _NOTE_EVERY_S:  # for a start after this one was killed
                    noted_s = budget.elapsed_s
                    self.folder.write({**self.folder.read(), **self._facts(budget)})
                    self._report()
        display.poll()
        if fit.error is not None:
            raise fit.error

    def _report(self) -> None:
        """Write report.html. Whatever is wrong with it ends no sweep."""
        try:
            write_report(self.folder)
        except Exception as error:
            if not self.unreported:
                self.say(f"note: report.html could not be written: {type(error).__name__}: {error}")
            self.unreported = True

    def _close_where_due(self, course: Course, display: SweepDisplay, budget: Budget) -> None:
        if self.interrupts.count:
            course.close(BY_SIGNAL)
            display.say("stopping: the trials save a checkpoint (again to stop at once)")
        elif limit := budget.over(course):
            course.close(limit)
            display.say(f"{limit}: the trials save a checkpoint and end")

    # -- ends ------------------------------------------------------------------------------------

    def _conclude(self, course: Course, budget: Budget) -> int:
        """The best trial's result in best/, the table, and the exit code."""
        self.lock.check()
        for end in course.ends.values():  # a store may have been away when it was written
            self.folder.write_end(end)
        best, left = course.best(), course.left()
        if not self.sweep.section.keep_pruned_checkpoints:
            for number, end in course.ends.items():
                if end.status == STOPPED:
                    self.folder.drop_checkpoints(number)
        facts = self.folder.read()
        if best is not None:
            self.folder.publish_best(best, self._config_of(best, facts["config"]))
        ended_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.outcome = "stopped" if left else "finished"
        ended = {"best": best, "outcome": self.outcome, "why": course.closed}
        self.folder.write({**facts, **ended, **self._facts(budget), "ended_at": ended_at})
        self._report()
        words.print_result(self.console, self.folder, course, self.points, budget)
        if self.interrupts.count:
            self.say(f"stopped with {summary.plural(len(left), 'trial')} to go; go on with --resume")
            return INTERRUPTED
        if left:
            self.say(f"{summary.plural(len(left), 'trial')} to go; go on with --resume, and more to spend")
        if best is None:
            why = course.closed or "no trial came to its end; the table says why"
            self.errors.print(Text(f"error: {why}"), soft_wrap=True)
        return 0 if best is not None else 1

    def _config_of(self, best: int, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What trains the best trial again, in a folder beside the sweep's."""
        own = {**shared, **self.points[best], "output_dir": f"{self.folder.place}-{BEST_NAME}"}
        return {name: value for name, value in own.items() if value is not None}

    def _fail(self, error: BaseException) -> int:
        cause, line = root_cause(error), one_line(error)
        text = "".join(traceback.format_exception(error))
        if self.begun and self.lock.holds():
            self.own.append_error("driver of the sweep", text)
            with contextlib.suppress(OSError):
                self.folder.keep(self.own.error_file)
            if not isinstance(cause, NemoRayError):
                line += f" (full traceback: {self.folder.shown(self.own.error_file)})"
        elif not isinstance(cause, NemoRayError):
            self.errors.print(Text(text), soft_wrap=True)
        for part in line.splitlines():
            self.errors.print(Text(f"error: {part}"), soft_wrap=True)
        return cause.exit_code if isinstance(cause, NemoRayError) else 1

    def _end(self) -> None:
        """End the data pipeline and Ray: at every end, and at a second signal while the first is served."""
        if not self._ending.acquire(blocking=False):
            return
        self.stop_data.set()
        if self.data is not None:  # Ray 2.60 ends a process with code 1 where a thread still asks for it
            self.data.wait(_DATA_ENDS_WITHIN_S)
        if "ray" in sys.modules:
            session.shutdown()
        self.environment.restore()
        if self.parent is not None:
            self.parent.end(self.outcome)
        if self.begun and self.lock.holds():
            shutil.rmtree(self.folder.ray_dir, ignore_errors=True)
        self.lock.release()
