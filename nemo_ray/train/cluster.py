"""Ray Train around the workers: what a run asks of it, and which failures end a run instead of restarting it.

Knows no data, no model and no terminal.
"""

import contextlib
import os
import shutil
import socket
import traceback
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import RaySection
from nemo_ray.errors import ClusterError
from nemo_ray.failures import first_failure, is_final, is_lost_worker, one_line, root_cause
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import StoredRunDir
from nemo_ray.train import full_disk, run_service
from nemo_ray.train.driver import Driver
from nemo_ray.train.driver_lock import only_while_held
from nemo_ray.train.logs import LEVEL_VARIABLE
from nemo_ray.train.lost import Failure, find_out
from nemo_ray.train.placement import free_abandoned_groups
from nemo_ray.train.processes import Look, look
from nemo_ray.train.remote_run import connect
from nemo_ray.train.resources import Demand
from nemo_ray.train.restarts import Restarts
from nemo_ray.train.watchdog import RankState, collective_timeout_s
from nemo_ray.urls import is_url

CONTROLLER_FAILURES = 3
ELASTIC_CONTROLLER_FAILURES = 100
LOOK_WITHIN_S = 20.0
WorkerFunction = Callable[[Mapping[str, Any]], Any]


def fit(
    worker: WorkerFunction | None,
    loop_config: Mapping[str, Any],
    run: RunDir,
    wanted: Demand,
    section: RaySection,
    driver: Driver,
    verbose: bool = False,
) -> Any:
    """Run the workers to their end and return what rank 0's function returned.

    Not for the main thread, where Ray would take over Ctrl-C. `worker` None is train.worker.train_worker. The
    workers end when `driver` no longer holds the run's directory.
    Raises what Ray raises: see failures.py.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    told = {"worker": worker, "output_dir": run.place, "loop_config": dict(loop_config), "driver": driver}
    if isinstance(run, StoredRunDir):
        told["loop_config"]["service"] = run_service.start(run.url, driver)
    for start in range(CONTROLLER_FAILURES + 1):
        try:
            return _trainer(told, run, wanted, section, verbose).fit().return_value
        except ControllerError as error:
            # Ray 2.60 ends a run in which a worker dies before the controller has asked for it once.
            died = isinstance(root_cause(error), RayActorError)
            if start == CONTROLLER_FAILURES or not died:
                raise
            run.append_failure({"line": one_line(error), "restart": True})
            free_abandoned_groups()
    raise AssertionError("the last start returns or raises")


def _trainer(told: Mapping[str, Any], run: RunDir, wanted: Demand, section: RaySection, verbose: bool) -> Any:
    """A TorchTrainer for one start, under a name of its own."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    return _trainer_class()(
        _run_worker,
        train_loop_config=dict(told),
        # gloo beside NCCL: counts and checkpoints are exchanged on the CPU, and never wait for the GPU.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if wanted.use_gpu else "gloo",
            timeout_s=round(collective_timeout_s(section.hang_timeout_s)),
        ),
        scaling_config=ScalingConfig(
            num_workers=wanted.num_workers
            if wanted.at_least is None
            else (wanted.at_least, wanted.num_workers),
            use_gpu=wanted.use_gpu,
            resources_per_worker=wanted.per_worker,
            accelerator_type=section.accelerator_type,
        ),
        run_config=RunConfig(
            # A name that was used before in the same storage would be resumed by Ray on its own.
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.ray_dir),
            # Lost workers are counted by our own callback: Ray counts those of a week like those of an hour.
            failure_config=FailureConfig(
                max_failures=-1,
                controller_failure_limit=CONTROLLER_FAILURES
                if wanted.at_least is None
                else ELASTIC_CONTROLLER_FAILURES,
            ),
            worker_runtime_env={"env_vars": _worker_environment(os.environ, verbose)},
            callbacks=[_judge_failures(run, section.max_failures)],
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
    )


def _trainer_class() -> Any:
    """Ray's TorchTrainer; where no dashboard runs, as in a Ray of our own, without the callback that frees a
    placement group whose controller has died. It asks the dashboard for the controller: without one it frees
    nothing, and holds every run for 10 s at its end (Ray 2.60)."""
    from ray._private.worker import get_dashboard_url
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class WithoutDashboard(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]

    return TorchTrainer if get_dashboard_url() else WithoutDashboard


def environment(wanted: Demand) -> dict[str, str]:
    """Settings of Ray's that the driver must have before `fit`, unless the user chose otherwise."""
    # How long workers may take to start; Ray 2.60 counts longer starts over the whole run. A lost node may
    # take minutes to come back. Where fewer workers are enough, it is the time until Ray tries with fewer.
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300" if wanted.at_least is None else "45"}


def _worker_environment(environ: Mapping[str, str], verbose: bool) -> dict[str, str]:
    """Settings that a worker must have before its first allocation, unless the user chose otherwise."""
    # Expert banks of a GiB come and go beside small tensors: without it a part of the memory is holes.
    # Triton writes what it tuned to disk: a second run on the node starts a minute sooner.
    chosen = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TRITON_CACHE_AUTOTUNING": "1"}
    if verbose:
        chosen[LEVEL_VARIABLE] = "INFO"
    return {name: value for name, value in chosen.items() if name not in environ}


def _judge_failures(run: RunDir, max_failures: int) -> Any:
    """A callback for the controller: an exception raised in it ends the run at once (Ray 2.60)."""
    from ray.train import UserCallback

    class JudgeFailures(UserCallback):
        def __init__(self) -> None:
            self.last_line = ""
            self.restarts = Restarts(max_failures)

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            # Ray 2.60 waits for workers' farewells before it kills them, and passes this variable to nobody.
            os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
            error = root_cause(first_failure(worker_exceptions))
            line = one_line(error)
            if is_final(error) or (line == self.last_line and not is_lost_worker(error)):
                raise error
            self.last_line = line
            if getattr(error, "preempted", False):  # free, and raised at each poll until the node is gone
                return
            self.restart_or_end(find_out(run, worker_exceptions, _look_at))

        def restart_or_end(self, failure: Failure) -> None:
            shutil.rmtree(run.ranks_dir, ignore_errors=True)  # the next workers have nothing to do with it
            line = failure.line
            if failure.stacks:
                run.append_error(line, failure.stacks)
                line += f"; its stack is in {run.shown(run.error_file)}"
            newest = run.checkpoint_steps()
            restart = self.restarts.allows(newest[-1] if newest else 0)
            with contextlib.suppress(OSError):
                run.append_failure({"line": line, "restart": restart})
            if not restart:
                raise ClusterError(f"{line}; {self.restarts.describe()}")

    return JudgeFailures()


def _look_at(ranks: list[RankState], silent: bool) -> dict[int, Look]:
    """Look at the processes of ranks, elsewhere by a task on their node; who does not answer is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = socket.gethostname()
    looks = {state.rank: look(state.pid, silent) for state in ranks if state.host == here}
    nodes = {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for state in ranks:
        if state.rank not in looks and state.host in nodes:
            there = NodeAffinitySchedulingStrategy(nodes[state.host], soft=False)
            asked[task.options(scheduling_strategy=there).remote(state.pid, silent)] = state.rank
    answered = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_WITHIN_S)[0] if asked else []
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # the node went away meanwhile
            looks[asked[answer]] = ray.get(answer)
    return looks


def _run_worker(told: Mapping[str, Any]) -> Any:
    """What Ray calls on each worker. A run in a store is kept by its driver's actor, and ends with that."""
    if is_url(told["output_dir"]):
        return _work(told, connect(told["output_dir"], told["loop_config"]["service"]))
    with only_while_held(Path(told["output_dir"]), told["driver"]):
        return _work(told, RunDir(told["output_dir"]))


def _work(told: Mapping[str, Any], run: RunDir) -> Any:
    """Ray cuts long tracebacks: the whole one goes to error.log."""
    try:
        with full_disk.told(told["output_dir"]):
            if told["worker"] is not None:
                return told["worker"](told["loop_config"])
            from nemo_ray.train.worker import WorkerSpec, train_worker

            return train_worker({"spec": WorkerSpec(**told["loop_config"])})
    except BaseException:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        run.append_error(f"worker {rank}", traceback.format_exc())
        raise
