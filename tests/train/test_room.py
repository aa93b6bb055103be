"""Waiting for nodes: how long, what is asked for, and what is said."""

from typing import Any

import pytest

from nemo_ray.errors import ClusterError
from nemo_ray.train import room
from nemo_ray.train.resources import Demand

GPU_NODE, HEAD = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:H100": 1.0}, {"CPU": 4.0}
WANTED = Demand(8, True, {"CPU": 1.0, "GPU": 1.0})


class Cluster:
    """Which has one more node at each look, and a clock that goes on a second between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
        self.nodes, self.looks, self.now_s = nodes, 0, 0.0
        self.asked: list[list[dict[str, float]]] = []
        self.said: list[str] = []
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(room.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def look(self) -> list[dict[str, float]]:
        self.looks += 1
        return list(self.nodes[: self.looks])

    def wait(self, wanted: Demand, wait_s: float, kind: str | None = None) -> Any:
        return room.wait_for_room(wanted, kind, wait_s, self.look, self.said.append, self.asked.append)


def test_where_there_is_room_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD)
    assert cluster.wait(Demand(2, False, {"CPU": 1.0}), 100.0) is True
    assert cluster.wait(Demand(4, False, {"CPU": 1.0}), 100.0) is False  # no CPU is left for the data
    assert not cluster.asked and not cluster.said


def test_nodes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD, GPU_NODE, GPU_NODE, GPU_NODE)
    assert cluster.wait(WANTED, 100.0, "H100") is True
    assert cluster.looks == 3, "no longer than it takes"
    each = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert cluster.asked == [[each] * 8, []], "what the workers need, once, and taken back"
    (line,) = cluster.said
    assert line.startswith("waiting for nodes, 100 s at most: 8 workers with 1 CPU + 1 GPU")
    assert "the cluster has 4 CPU + 0 GPU" in line


def test_nodes_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD, GPU_NODE)
    with pytest.raises(ClusterError, match=r"room for 4; .* \(waited 90 s\)$"):
        cluster.wait(WANTED, 90.0)
    assert cluster.now_s == 90.0 and cluster.asked[-1] == [] and len(cluster.said) == 3


def test_without_the_key_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD)
    with pytest.raises(ClusterError, match=r"ray.wait_for_nodes_s=600 waits for an autoscaler\)$"):
        cluster.wait(WANTED, 0.0)
    assert cluster.now_s == 0.0 and not cluster.asked


def test_of_a_range_the_fewest_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD, GPU_NODE)
    assert cluster.wait(Demand(8, True, {"CPU": 1.0, "GPU": 1.0}, at_least=2), 50.0) is True
    assert len(cluster.asked[0]) == 2


def test_a_stop_takes_the_request_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, HEAD)

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        cluster.wait(WANTED, 100.0)
    assert cluster.asked[-1] == []
