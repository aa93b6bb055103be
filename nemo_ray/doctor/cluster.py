"""Every node of the connected Ray cluster, and what lies between them. Every wait has a limit.

A probe runs on each node, without CPUs of its own; where GPUs are free, one on each of them too. What they do
is machine.py's and network.py's.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_ray.data.nodes import check_shared
from nemo_ray.doctor import machine, network
from nemo_ray.doctor.findings import Finding, error, from_line, ok, warning
from nemo_ray.errors import ClusterError
from nemo_ray.failures import one_line

ANSWER_WITHIN_S = 90.0
"""For a node's first answer: its process starts, and imports torch from a cold disk."""
LITTLE_STORE_BYTES = 200 * 2**20
_CLOCK_READS = 3


class Node(NamedTuple):
    """A node that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        """For the reader."""
        return f"node {self.address}"

    @property
    def num_gpus(self) -> int:
        """Whole ones."""
        return int(self.resources.get("GPU", 0))


class Probe:
    """A process on a node, or on one of its GPUs."""

    def __init__(self) -> None:
        self._open: socket.socket | None = None

    def examine(self, folders: Mapping[str, str]) -> list[Finding]:
        """What machine.py says of it."""
        return list(machine.examine(folders))

    def time(self) -> float:
        """Its clock."""
        return time.time()

    def listen(self, host: str) -> int:
        """Opens a port."""
        self._open = network.listen(host)
        return int(self._open.getsockname()[1])

    def free_port(self, host: str) -> int:
        """One that nobody listens on."""
        with network.listen(host) as place:
            return int(place.getsockname()[1])

    def close(self) -> None:
        """Closes what `listen` opened."""
        if self._open is not None:
            self._open.close()

    def reach(self, places: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """See network.reach."""
        return network.reach(places)

    def sum(self, backend: str, rank: int, world: int, host: str, port: int) -> network.Sum:
        """See network.sum_over_group."""
        return network.sum_over_group(backend, rank, world, host, port)


def nodes() -> list[Node]:
    """Those that are alive."""
    found = ray.nodes()
    alive = [node for node in found if node["Alive"]]
    return [Node(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"])) for node in alive]


def examine(folders: Mapping[str, str]) -> dict[str, list[Finding]]:
    """By node, and of the cluster as a whole. `folders`: that a run writes to, by key; may be URLs."""
    there = nodes()
    on_disks = {key: folder for key, folder in folders.items() if "://" not in folder}
    probes = {node.name: _start(node, 0) for node in there}
    gpus_free = ray.available_resources().get("GPU", 0.0) >= sum(node.num_gpus for node in there)
    on_gpus = {
        node.name: [_start(node, 1) for _ in range(node.num_gpus)]
        for node in there
        if gpus_free and node.num_gpus
    }
    examined = {
        name: on_gpus.get(name, [probe])[0].examine.remote(on_disks) for name, probe in probes.items()
    }
    result: dict[str, list[Finding]] = {}
    for name, answer in _answers(examined, ANSWER_WITHIN_S).items():
        result[name] = [answer] if isinstance(answer, Finding) else answer
    for node in there:
        result[node.name].append(judge_store(node.resources.get("object_store_memory", 0.0)))
    alive = {name: probe for name, probe in probes.items() if result[name][0].subject != "node"}
    result["cluster"] = [
        *judge_sameness({name: found[0].says for name, found in result.items() if name in alive}),
        judge_authentication(_authenticated(), [node.address for node in there]),
        judge_dashboard(_dashboard()),
        *_between(alive, {node.name: node.address for node in there}),
        *_gpu_sums(on_gpus, gpus_free, there),
        *judge_shared(folders, len(there)),
    ]
    return result


def _start(node: Node, num_gpus: int) -> Any:
    place = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return (
        ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0)(Probe)
        .options(scheduling_strategy=place)
        .remote()
    )


def _answers(asked: Mapping[str, Any], within_s: float) -> dict[str, Any]:
    """Each answer by name; a Finding about the node where there was none."""
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s)
    answers: dict[str, Any] = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            answers[name] = judge_silence(within_s)
        except ray.exceptions.RayError as failed:
            answers[name] = judge_failure(one_line(failed))
    return answers


def judge_silence(within_s: float) -> Finding:
    """Of a node that does not answer."""
    return error(
        "node", f"no answer within {within_s:.0f} s", "look at it: is it overloaded, or does its disk hang?"
    )


def judge_failure(line: str) -> Finding:
    """Of a node whose probe failed."""
    if "No module named" in line:
        return error(
            "node",
            f"its Python lacks a package: {line}",
            "install nemo-ray there as on the head, or send it along: nemo-ray submit",
        )
    return error("node", line, "look at Ray's logs of that node (ray logs cluster)")


# -- between nodes --------------------------------------------------------------------------------


def _between(probes: Mapping[str, Any], addresses: Mapping[str, str]) -> list[Finding]:
    clocks = {name: clock for name, probe in probes.items() if (clock := _clock(probe)) is not None}
    found = [network.judge_clocks(clocks)] if clocks else []
    if len(probes) < 2:
        return found
    ports = _answers({name: probes[name].listen.remote(addresses[name]) for name in probes}, network.WITHIN_S)
    open_ports = {
        name: (addresses[name], port) for name, port in ports.items() if not isinstance(port, Finding)
    }
    reached = _answers(
        {name: probe.reach.remote(open_ports) for name, probe in probes.items()}, network.WITHIN_S
    )
    failed = unreached(ports, reached)
    for probe in probes.values():
        probe.close.remote()
    members = f"{len(probes)} nodes"
    host = addresses[next(iter(probes))]
    return [*found, network.judge_ports(failed), _sum_over("gloo", list(probes.values()), host, members)]


def unreached(ports: Mapping[str, Any], reached: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Why, by (from, to). Of each node the port that it opened, and what it did not reach; a Finding where it
    gave no answer, which counts as not reached."""
    failed = {(name, name): port.says for name, port in ports.items() if isinstance(port, Finding)}
    for source, answer in reached.items():
        if isinstance(answer, Finding):
            failed[source, "the others"] = answer.says
        else:
            failed |= {(source, target): why for target, why in answer.items()}
    return failed


def _clock(probe: Any) -> network.Clock | None:
    """The most exact of a few readings."""
    readings = []
    for _ in range(_CLOCK_READS):
        asked_s = time.time()
        try:
            theirs_s = ray.get(probe.time.remote(), timeout=network.WITHIN_S)
        except ray.exceptions.RayError:
            return None
        readings.append(network.clock_of(asked_s, theirs_s, time.time()))
    return min(readings, key=lambda clock: clock.within_s)


def _sum_over(backend: str, probes: Sequence[Any], host: str, members: str) -> Finding:
    """A sum over the probes' processes, which meet at the first one, on `host`."""
    (port,) = _answers({"": probes[0].free_port.remote(host)}, network.WITHIN_S).values()
    if isinstance(port, Finding):
        return port
    world = len(probes)
    asked = {f"{rank}": p.sum.remote(backend, rank, world, host, port) for rank, p in enumerate(probes)}
    answers = _answers(asked, 3 * network.WITHIN_S).values()
    sums = [network.Sum(0.0, one.says) if isinstance(one, Finding) else one for one in answers]
    return network.judge_sum(backend, sums, members)


def _gpu_sums(probes: Mapping[str, Sequence[Any]], free: bool, there: Sequence[Node]) -> list[Finding]:
    number = sum(node.num_gpus for node in there)
    if number < 2:
        return []
    if not free:
        remedy = "call it again when they have ended"
        return [warning("NCCL", "not tried: other jobs use some of the GPUs", remedy)]
    host = next(node.address for node in there if node.num_gpus)
    members = [probe for node in there for probe in probes.get(node.name, [])]
    return [_sum_over("nccl", members, host, f"{number} GPUs")]


# -- of the whole ---------------------------------------------------------------------------------


def judge_sameness(versions: Mapping[str, str]) -> list[Finding]:
    """Whether all nodes have the same packages. `versions`: what each says of its own."""
    if len(versions) < 2:
        return []
    usual = max(set(versions.values()), key=list(versions.values()).count)
    others = [name for name, said in versions.items() if said != usual]
    if not others:
        return [ok("versions", "the same on all nodes")]
    says = f"others on {', '.join(others)} than on the rest"
    return [warning("versions", says, "install the same versions everywhere (constraints.txt)")]


def judge_store(size_bytes: float) -> Finding:
    """A node's object store."""
    says = f"{size_bytes / 2**30:.1f} GiB"
    if size_bytes >= LITTLE_STORE_BYTES:
        return ok("object store", says)
    return warning("object store", says, "start Ray with --object-store-memory of 1 GiB or more")


def judge_authentication(on: bool, addresses: Sequence[str]) -> Finding:
    """Whether who reaches the cluster's ports may run code on it."""
    if on:
        return ok("authentication", "Ray asks for a token")
    if all(address.startswith("127.") for address in addresses):
        return ok("authentication", "off; the cluster listens on this machine's loopback only")
    return warning(
        "authentication",
        "off: whoever reaches the cluster's ports can run code on it",
        "set RAY_AUTH_MODE=token on all nodes before Ray starts there, and keep the ports from the internet",
    )


def judge_dashboard(url: str | None, within_s: float = 5.0) -> Finding:
    """Whether jobs can be handed in."""
    remedy = "start the head with --include-dashboard=true and ray[default] installed, and open its port"
    if not url:
        return warning("dashboard", "there is none, so no job can be submitted", remedy)
    place = urlsplit(f"http://{url}")
    failed = network.reach({"": (place.hostname or "", place.port or 80)}, within_s)
    if failed:
        says = f"http://{url} is not reached from here ({failed['']}), so no job can be submitted from here"
        return warning("dashboard", says, remedy)
    return ok("dashboard", f"http://{url}")


def judge_shared(folders: Mapping[str, str], num_nodes: int) -> list[Finding]:
    """Whether every node sees what the others write to the folders."""
    if not folders or num_nodes < 2:
        return []
    try:
        check_shared(folders)
    except ClusterError as refused:
        return [from_line("shared folders", str(refused))]
    return [ok("shared folders", f"every node sees what the others write: {', '.join(folders.values())}")]


def _authenticated() -> bool:
    # Ray 2.60 has no public name for it.
    from ray._raylet import AuthenticationMode, get_authentication_mode

    return bool(get_authentication_mode() != AuthenticationMode.DISABLED)


def _dashboard() -> str | None:
    from ray._private.worker import get_dashboard_url  # nor for this

    url: str | None = get_dashboard_url()
    return url
