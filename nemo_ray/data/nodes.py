"""Do all nodes of the cluster see the folders that a run writes to? Asked before it starts.

Owns who asks on which node, with Ray. What is written and looked for is shared_folder.py's.
"""

import contextlib
import uuid
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_ray.errors import ClusterError
from nemo_ray.failures import one_line
from nemo_ray.shared_folder import missing_tokens, not_shared, remove_tokens, write_token


def check_shared(folders: Mapping[str, str], within_s: float = 60.0) -> None:
    """Let every node of the cluster write to each folder (or URL), and look for what the others wrote.

    `folders`: by the configuration's key. Raises ClusterError, within about 2 * `within_s`. Ray must be
    running; a single node is not asked.
    """
    found = ray.nodes()  # type: ignore[no-untyped-call]
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in found if node["Alive"]}
    if len(hosts) < 2:
        return
    check = uuid.uuid4().hex[:12]
    try:
        for (key, node), (error, _) in _on_all(hosts, within_s, folders, _write_token, check):
            raise ClusterError(f"{key}: {folders[key]} cannot be written on node {hosts[node]}: {error}")
        seen = _on_all(hosts, within_s, folders, _missing_tokens, check, list(hosts), within_s / 2)
        for (key, node), (error, missing) in seen:
            if error:
                raise ClusterError(f"{key}: {folders[key]} cannot be read on node {hosts[node]}: {error}")
            raise ClusterError(not_shared(key, folders[key], hosts[node], hosts[missing[0]]))
    finally:
        with contextlib.suppress(ClusterError):
            _on_all(hosts, within_s, folders, _remove_tokens, check)


Answer = tuple[str, list[str]]
"""(what failed, or nothing; nodes that were not seen)."""


def _on_all(
    hosts: Mapping[str, str], within_s: float, folders: Mapping[str, str], work: Any, *arguments: object
) -> list[tuple[tuple[str, str], Answer]]:
    """What is wrong with each (key, node), as `work` found it on that node."""
    asked = {}
    for node in hosts:
        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=strategy)
        for key, folder in folders.items():
            asked[task.remote(folder, node, *arguments)] = (key, node)
    done, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=within_s)
    if waiting:
        key, node = asked[waiting[0]]
        raise ClusterError(
            f"node {hosts[node]} did not answer within {within_s:.0f} s; is it alive, and does its file "
            f"system answer ({folders[key]})?"
        )
    try:
        answers: dict[tuple[str, str], Answer] = {asked[ref]: ray.get(ref) for ref in done}
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a node was lost while folders were compared: {one_line(error)}") from error
    return [(place, answer) for place, answer in sorted(answers.items()) if any(answer)]


def _write_token(folder: str, node: str, check: str) -> Answer:
    try:
        write_token(folder, check, node)
    except OSError as error:
        return one_line(error), []
    return "", []


def _missing_tokens(folder: str, node: str, check: str, nodes: list[str], within_s: float) -> Answer:
    try:
        return "", missing_tokens(folder, check, nodes, within_s)
    except OSError as error:
        return one_line(error), []


def _remove_tokens(folder: str, node: str, check: str) -> Answer:
    remove_tokens(folder, check)
    return "", []
