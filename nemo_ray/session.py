"""Ray as the driver's commands use it: start one of our own or join a cluster, count its nodes, leave it.

Ray is imported on first use: a configuration that is refused is refused without it. What runs on Ray is the
callers' business.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nemo_ray.config.schema import RaySection
from nemo_ray.errors import ClusterError
from nemo_ray.failures import one_line

CONNECT_WITHIN_S = 20.0
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In which Ray 2.60 hands the metadata and runtime_env of a submitted job to its driver."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives its first node."""
_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
_CLUSTERS: list[bool] = []
"""Ray's own setting before `start_local` changed it."""
_PRINT: list[Callable[..., None]] = []
"""How Ray prints, before `start_local` or `connect` changed it."""
_TOKEN: list[str] = []
"""That of this process's own Rays, from the first on."""
# What Ray 2.60 does otherwise, in a process that reads it:
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # each report waits for the controller's poll, every 2 s
    # A stopped process is waited for, 10 minutes. A minute is enough for what holds the interpreter's lock
    # rightly (an import from a cold network disk), and for what Ray notices by itself (a dead node, in 30 s).
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints come twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers leave the directory that a job's paths are relative to
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that calls Ray after its end starts another one
}


_LOST_WORKER = "A worker died or was killed while executing a task"


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


def start_local(
    num_cpus: int, environment: Environment, include_dashboard: bool = False, verbose: bool = False
) -> None:
    """Start a Ray of our own, reachable from this machine only.

    `verbose`: with all that Ray and its processes log.

    Must run in the main thread: the kernel ends Ray's processes with the thread that started them.
    Without a dashboard a trial that Tune stops leaks its placement group (Ray 2.60); a single run has none.
    """
    environment.add(SETTINGS)
    # Ray 2.60 listens on loopback only where it is told not to be part of a cluster (_node_ip_address is not
    # enough), under the name that this has on desktop systems.
    environment.add({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
    # Ray 2.60 warns of many processes on a node (8 in a sweep), past log_to_driver. With this it does not.
    environment.add({"RAY_worker_maximum_startup_concurrency": "64"})
    # One more process with each start of the workers, to hear of nodes that a cluster is about to lose.
    environment.add({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})
    if "RAY_AUTH_MODE" not in os.environ and (_TOKEN or "ray" not in sys.modules):
        # A token of its own: Ray's would stay in ~/.ray/auth_token, in the way of later commands. Ray 2.60
        # reads both once, when it is imported: whoever did that before us has chosen.
        _TOKEN[:] = _TOKEN or [secrets.token_hex(32)]
        environment.add({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN[0]})
    import ray
    from ray._private import ray_constants

    # The same for a process that had imported Ray already: it is read then. Put back by `shutdown`.
    _CLUSTERS.append(ray_constants.ENABLE_RAY_CLUSTER)
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not verbose:
        _print_no_lost_workers()
    try:
        with _in_groups_of_their_own():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=include_dashboard,
                object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
            )
    except Exception as error:
        raise ClusterError(f"a local Ray could not be started: {one_line(error)}") from error


def _print_no_lost_workers() -> None:
    """Ray 2.60 prints a paragraph of a process that is lost, past log_to_driver; ours is one line. `shutdown`
    lets it again."""
    from ray._private import worker

    print_all = worker.print_to_stdstream

    def print_others(data: dict[str, Any], ignore_prefix: bool) -> None:
        if not data["lines"][0].startswith(_LOST_WORKER):
            print_all(data, ignore_prefix)

    _PRINT.append(print_all)
    worker.print_to_stdstream = print_others


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Keep signals to this process's group from the processes that Ray starts meanwhile.

    `timeout`, shells and batch systems send SIGTERM to a whole group. Ray 2.60 guards its processes against
    SIGINT only, and a run that is told to end needs them until it has saved.
    """
    from ray._private import utils

    # Called in each of them, before it begins.
    tie_to_parent: Callable[[], None] = utils.set_kill_on_parent_death_linux

    def begin() -> None:
        os.setpgrp()
        tie_to_parent()

    utils.set_kill_on_parent_death_linux = begin
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = tie_to_parent


def connect(
    address: str,
    environment: Environment,
    variables: Mapping[str, str] | None = None,
    verbose: bool = False,
) -> None:
    """Join the cluster at `address`: host:port or "auto".

    variables: environment variables of this process that the job's processes on all nodes are to have too.
    verbose: with all that Ray and the job's processes log.
    Raises: ClusterError where it cannot be reached within CONNECT_WITHIN_S.
    """
    where = f"the Ray cluster at {address}"
    if "://" in address:
        raise ClusterError(
            f"ray.address: {address} cannot be joined from here; use `ray job submit "
            "--address=http://HOST:8265 -- python -m nemo_ray.train CONFIG.yaml`, or give HOST:PORT on a "
            "node of the cluster"
        )
    environment.add(SETTINGS)
    until = time.monotonic() + CONNECT_WITHIN_S
    if address != "auto":
        _check_reachable(address, where)
    import ray

    if not verbose:
        _print_no_lost_workers()
    failed: list[BaseException] = []
    given = _job_variables(os.environ)  # Ray refuses to be told of one twice
    added = {name: value for name, value in (variables or {}).items() if name not in given}
    runtime_env = {"env_vars": added} if added else None

    def join() -> None:
        try:
            ray.init(
                address=address,
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
                runtime_env=runtime_env,
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="ray-init", daemon=True)
    thread.start()
    thread.join(max(1.0, until - time.monotonic()))
    if thread.is_alive():
        raise ClusterError(f"{where} did not answer within {CONNECT_WITHIN_S:g} s; is it a Ray head's port?")
    if failed:
        raise ClusterError(f"{where} could not be joined: {one_line(failed[0])}") from failed[0]


def _job_variables(environ: Mapping[str, str]) -> set[str]:
    """Names of the variables that `ray job submit` was told to give to all processes of this job."""
    try:
        return set(json.loads(environ[JOB_CONFIG_VARIABLE])["runtime_env"]["env_vars"])
    except (KeyError, TypeError, json.JSONDecodeError):
        return set()


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


def require_none() -> None:
    """Raises: ClusterError where this process is connected to a Ray already, which a run would end."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise ClusterError(
            "this process has called ray.init already, and a run starts or joins a Ray of its own: call "
            "ray.shutdown() first, and set ray.address for a cluster"
        )


def nodes() -> list[dict[str, float]]:
    """Total resources of each node that is alive."""
    import ray

    found = ray.nodes()  # type: ignore[no-untyped-call]
    return [dict(node["Resources"]) for node in found if node["Alive"]]


def on_this_node() -> dict[str, float]:
    """A resource that this node alone has, for what must run here."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    found = ray.nodes()  # type: ignore[no-untyped-call]
    has = next(node["Resources"] for node in found if node["NodeID"] == own)
    name = next(name for name in has if name.startswith("node:") and name != HEAD)
    return {name: 0.001}


def shutdown() -> None:
    """Leave Ray, and end it if it is ours."""
    with contextlib.suppress(ImportError):
        import ray

        if ray.is_initialized():
            ray.shutdown()
        if _CLUSTERS:
            from ray._private import ray_constants

            ray_constants.ENABLE_RAY_CLUSTER = _CLUSTERS[0]
            _CLUSTERS.clear()
        if _PRINT:
            from ray._private import worker

            worker.print_to_stdstream = _PRINT[0]
            _PRINT.clear()
