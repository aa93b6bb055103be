"""A Ray cluster on loopback that a test starts and ends itself: a head, and nodes with their own raylets."""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.command import Command

# The commands that a user types are those of this environment, also where it is not activated.
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
TOKEN = secrets.token_hex(32)
ENVIRONMENT = {
    "PATH": PATH,
    "RAY_AUTH_MODE": "token",  # a token of its own: Ray would keep one in the user's home
    "RAY_AUTH_TOKEN": TOKEN,
}
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""With which Ray 2.60 listens on loopback only, and takes no second node."""
_START_WITHIN_S = 120.0
_GIVEN: set[int] = set()
"""Ports that this process has given to clusters, which may not listen on them yet."""


class Nodes:
    """A head with `num_cpus` and `resources` from the start; `add` brings more, unless it is `alone`."""

    def __init__(
        self, folder: Path, num_cpus: int, resources: str, alone: bool, environment: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self.environment = {**ENVIRONMENT, **(_ALONE if alone else {}), **environment}
        # Paths of sockets are limited to 107 characters.
        self.temp_dir = tempfile.mkdtemp(prefix="nr-", dir="/tmp")
        self._ports = iter(_free_ports(40))
        gcs, dashboard, client = (next(self._ports) for _ in range(3))
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.commands: list[Command] = []
        self.head = self._start(
            *("--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={self.temp_dir}"),
            *(f"--num-cpus={num_cpus}", f"--resources={resources}"),
        )
        self.head.wait_until(lambda: _answers(f"{self.dashboard}/api/jobs/"), _START_WITHIN_S)

    def add(self, num_cpus: int, resources: str = "{}", **environment: str) -> Command:
        """Another node, which can be killed: it is there when its command says so.

        `environment`: variables of its own processes.
        """
        ip = f"127.0.0.{len(self.commands) + 1}"  # a driver on 127.0.0.1 then takes the head for its own node
        node = self._start(
            *(f"--address={self.address}", f"--node-ip-address={ip}"),
            *(f"--num-cpus={num_cpus}", f"--resources={resources}"),
            **environment,
        )
        node.wait_until(lambda: "Ray runtime started." in node.output, _START_WITHIN_S)
        return node

    def _start(self, *arguments: str, **environment: str) -> Command:
        agent, runtime, metrics = (next(self._ports) for _ in range(3))
        command = Command(
            [
                *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments),
                *(f"--dashboard-agent-listen-port={agent}", f"--runtime-env-agent-port={runtime}"),
                *(f"--metrics-export-port={metrics}", "--object-store-memory=268435456"),
            ],
            self._folder / f"node-{len(self.commands)}.log",
            **{**self.environment, **environment},
        )
        self.commands.append(command)
        return command

    def end(self) -> None:
        """End all nodes that are left."""
        for command in reversed(self.commands):
            command.kill_tree()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


@contextmanager
def nodes(
    folder: Path, num_cpus: int, resources: str = "{}", alone: bool = False, **environment: str
) -> Iterator[Nodes]:
    """A cluster for a `with` block; `environment`: variables of its processes."""
    made = Nodes(folder, num_cpus, resources, alone, environment)
    try:
        yield made
    finally:
        made.end()


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range of workers' and clients' ports; others each time."""
    found: list[int] = []
    for port in range(7100 + os.getpid() % 500, 9900):
        if port in _GIVEN:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            _GIVEN.update(found)
            return found
    raise AssertionError("no free ports")


def _answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
