"""Ray as the driver uses it: start or join it, count its nodes, run the workers.

Ray is imported on first use: a configuration that is refused is refused without it. Knows no data, no model
and no terminal.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemo_ray.config.schema import RaySection
from nemo_ray.errors import ClusterError
from nemo_ray.run_dir import RunDir
from nemo_ray.train.failures import is_final, is_lost_worker, one_line
from nemo_ray.train.resources import Demand

CONNECT_WITHIN_S = 20.0
CONTROLLER_FAILURES = 3
_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
# What Ray 2.60 does otherwise:
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # each report waits for the controller's poll, every 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints come twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers leave the directory that a job's paths are relative to
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that calls Ray after its end starts another one
}
WorkerFunction = Callable[[Mapping[str, Any]], Any]


class Environment:
    """Environment variables that Ray reads, set where the user did not, and put back at the end."""

    def __init__(self) -> None:
        self._added: list[str] = []

    def add(self, variables: Mapping[str, str]) -> None:
        """Set what is not set."""
        for name, value in variables.items():
            if name not in os.environ:
                os.environ[name] = value
                self._added.append(name)

    def restore(self) -> None:
        """Take out what `add` put in."""
        while self._added:
            os.environ.pop(self._added.pop(), None)


def address_to_join(section: RaySection, environ: Mapping[str, str]) -> str | None:
    """The cluster to connect to, or None for a Ray of our own."""
    address = section.address or environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def start_local(num_cpus: int, environment: Environment, include_dashboard: bool = False) -> None:
    """Start a Ray of our own, reachable from this machine only.

    Must run in the main thread: the kernel ends Ray's processes with the thread that started them.
    Without a dashboard a trial that Tune stops leaks its placement group (Ray 2.60); a single run has none.
    """
    environment.add(_ENVIRONMENT)
    # Ray 2.60 listens on loopback only where it is told not to be part of a cluster (_node_ip_address is not
    # enough), under the name that this has on desktop systems.
    environment.add({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
    if "RAY_AUTH_MODE" not in os.environ:
        # A token of its own: Ray's would stay in ~/.ray/auth_token, in the way of later commands.
        environment.add({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=include_dashboard,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:
        raise ClusterError(f"a local Ray could not be started: {one_line(error)}") from error


def connect(address: str, environment: Environment) -> None:
    """Join the cluster at `address`: host:port or "auto".

    Raises: ClusterError where it cannot be reached within CONNECT_WITHIN_S.
    """
    where = f"the Ray cluster at {address}"
    if "://" in address:
        raise ClusterError(
            f"ray.address: {address} cannot be joined from here; use `ray job submit "
            "--address=http://HOST:8265 -- python -m nemo_ray.train CONFIG.yaml`, or give HOST:PORT on a "
            "node of the cluster"
        )
    environment.add(_ENVIRONMENT)
    until = time.monotonic() + CONNECT_WITHIN_S
    if address != "auto":
        _check_reachable(address, where)
    import ray

    failed: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="ray-init", daemon=True)
    thread.start()
    thread.join(max(1.0, until - time.monotonic()))
    if thread.is_alive():
        raise ClusterError(f"{where} did not answer within {CONNECT_WITHIN_S:g} s; is it a Ray head's port?")
    if failed:
        raise ClusterError(f"{where} could not be joined: {one_line(failed[0])}") from failed[0]


def _check_reachable(address: str, where: str) -> None:
    """A refused or filtered port is told at once; Ray itself would retry for a minute and end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"ray.address: {address} is not HOST:PORT (a Ray head listens on port 6379 by default)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        raise ClusterError(
            f"{where} is not reachable ({error.strerror or error}); is its head running?"
        ) from error


def nodes() -> list[dict[str, float]]:
    """Total resources of each node that is alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def shutdown() -> None:
    """Leave Ray, and end it if it is ours."""
    with contextlib.suppress(ImportError):
        import ray

        if ray.is_initialized():
            ray.shutdown()


def fit(
    worker: WorkerFunction | None,
    loop_config: Mapping[str, Any],
    run: RunDir,
    wanted: Demand,
    section: RaySection,
) -> Any:
    """Run the workers to their end and return what rank 0's function returned.

    Not for the main thread, where Ray would take over Ctrl-C. `worker` None is train.worker.train_worker.
    Raises what Ray raises: see failures.py.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "output_dir": str(run.path), "loop_config": dict(loop_config)},
        # gloo beside NCCL: counts and checkpoints are exchanged on the CPU, and never wait for the GPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if wanted.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=wanted.num_workers,
            use_gpu=wanted.use_gpu,
            resources_per_worker=wanted.per_worker,
            accelerator_type=section.accelerator_type,
        ),
        run_config=RunConfig(
            # A name that was used before in the same storage would be resumed by Ray on its own.
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.ray_dir),
            failure_config=FailureConfig(
                max_failures=section.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            callbacks=[_end_where_restarts_are_useless()],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    return trainer.fit().return_value


def _end_where_restarts_are_useless() -> Any:
    """A callback for the controller: an exception raised in it ends the run at once (Ray 2.60)."""
    from ray.train import UserCallback

    class EndWhereRestartsAreUseless(UserCallback):
        def __init__(self) -> None:
            self.last_line = ""

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            from nemo_ray.train.failures import first_failure, root_cause

            error = root_cause(first_failure(worker_exceptions))
            line = one_line(error)
            if is_final(error) or (line == self.last_line and not is_lost_worker(error)):
                raise error
            self.last_line = line

    return EndWhereRestartsAreUseless()


def _run_worker(told: Mapping[str, Any]) -> Any:
    """What Ray calls on each worker. Ray cuts long tracebacks: the whole one goes to error.log."""
    try:
        if told["worker"] is not None:
            return told["worker"](told["loop_config"])
        from nemo_ray.train.worker import WorkerSpec, train_worker

        return train_worker({"spec": WorkerSpec(**told["loop_config"])})
    except BaseException:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        log_traceback(RunDir(told["output_dir"]).error_file, f"worker {rank}", traceback.format_exc())
        raise


def log_traceback(path: Path, who: str, text: str) -> None:
    """Append a traceback to the run's error.log; a disk that does not take it hides nothing else."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(f"--- {who}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n{text.rstrip()}\n\n")
