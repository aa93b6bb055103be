"""Waiting until a cluster has room for the workers: an autoscaler, or a person, may be adding nodes."""

import time
from collections.abc import Callable, Mapping, Sequence

from nemo_ray.errors import ClusterError
from nemo_ray.train.resources import Demand, bundle, place

Nodes = Sequence[Mapping[str, float]]
_POLL_S = 1.0
_SAY_EVERY_S = 30.0


def _request(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def wait_for_room(
    wanted: Demand,
    accelerator_type: str | None,
    wait_s: float,
    nodes: Callable[[], Nodes],
    say: Callable[[str], None],
    request: Callable[[list[dict[str, float]]], object] = _request,
) -> bool:
    """`place` of resources.py, once the workers fit; nodes are asked for meanwhile, for as many as that.

    Args:
        nodes: each node's total resources, now.
        request: asks the cluster's autoscaler for room for such bundles at a time; Ray's own by default.

    Raises: ClusterError where they do not fit after `wait_s` seconds.
    """
    began_s, said_s, asked = time.monotonic(), float("-inf"), False
    try:
        while True:
            try:
                return place(wanted, nodes(), accelerator_type)
            except ClusterError as error:
                now_s = time.monotonic()
                if now_s - began_s >= wait_s:
                    waited = (
                        f"waited {wait_s:g} s"
                        if wait_s
                        else "ray.wait_for_nodes_s=600 waits for an autoscaler"
                    )
                    raise ClusterError(f"{error} ({waited})") from None
                if not asked:
                    asked = True
                    request([bundle(wanted, accelerator_type)] * (wanted.at_least or wanted.num_workers))
                if now_s - said_s >= _SAY_EVERY_S:
                    said_s = now_s
                    say(f"waiting for nodes, {wait_s - (now_s - began_s):,.0f} s at most: {error}")
            time.sleep(_POLL_S)
    finally:
        if asked:
            request([])  # from here on the workers themselves are what is asked for
