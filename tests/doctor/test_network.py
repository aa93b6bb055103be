"""What lies between processes: real sockets and groups on loopback, and what their figures mean."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_ray.doctor import cluster, network
from nemo_ray.doctor.findings import ERROR, OK, WARNING
from nemo_ray.doctor.network import Clock, Sum


def free_port() -> int:
    with network.listen("127.0.0.1") as place:
        return int(place.getsockname()[1])


def test_ports_that_are_reached_and_those_that_are_not() -> None:
    closed = free_port()
    with network.listen("127.0.0.1") as place:
        there = {"a": place.getsockname(), "b": ("127.0.0.1", closed)}
        assert network.reach(there, within_s=2) == {"b": "Connection refused"}
    assert network.judge_ports({}).state == OK
    found = network.judge_ports({("n1", "n2"): "timed out", ("n2", "n1"): "timed out"})
    assert found.state == ERROR and "n1 does not reach a port of n2: timed out, and 1 more" in found.says


def test_a_node_without_an_answer_is_not_reached() -> None:
    silent = cluster.judge_silence(20)
    assert cluster.unreached({"a": 1, "b": 2}, {"a": {}, "b": {}}) == {}
    assert cluster.unreached({"a": 1, "b": silent}, {"a": {}, "b": {"a": "timed out"}}) == {
        ("b", "b"): silent.says,
        ("b", "a"): "timed out",
    }
    assert cluster.unreached({"a": 1}, {"a": silent}) == {("a", "the others"): silent.says}


def test_a_sum_over_gloo() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(network.sum_over_group, "gloo", rank, 3, "127.0.0.1", port) for rank in range(3)]
        sums = [one.result(timeout=60) for one in asked]
    assert all(one.failed == "" and one.bytes_per_s > 1e6 for one in sums)


def test_a_member_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WITHIN_S", 2.0)
    alone = network.sum_over_group("gloo", 0, 2, "127.0.0.1", free_port())
    assert alone.failed
    found = network.judge_sum("gloo", [alone], "2 nodes")
    assert found.state == ERROR and "GLOO_SOCKET_IFNAME" in found.remedy


def test_slow_sums() -> None:
    assert network.judge_sum("gloo", [Sum(1e9), Sum(2e9)], "2 nodes").state == OK
    assert network.judge_sum("gloo", [Sum(1e9), Sum(1e7)], "2 nodes").state == WARNING
    slow = network.judge_sum("nccl", [Sum(1e9)], "8 GPUs")
    assert slow.state == WARNING and "NCCL_DEBUG" in slow.remedy
    assert network.judge_sum("nccl", [Sum(100e9)], "8 GPUs").state == OK
    failed = network.judge_sum("nccl", [Sum(0.0, "unhandled system error")], "8 GPUs")
    assert failed.state == ERROR and "NCCL_SOCKET_IFNAME" in failed.remedy


def test_clocks() -> None:
    assert network.clock_of(100.0, 107.5, 101.0) == Clock(7.0, 0.5)
    right, unsure = Clock(0.01, 0.001), Clock(3.0, 2.9)
    assert network.judge_clocks({"n1": right, "n2": unsure}).state == OK, "that may be the way there"
    behind = network.judge_clocks({"n1": right, "n2": Clock(-60.0, 0.1)})
    assert behind.state == WARNING and "n2 is 60 s behind" in behind.says and "chrony" in behind.remedy
    assert network.judge_clocks({"n1": Clock(4000.0, 0.1)}).state == ERROR


def test_authentication() -> None:
    assert cluster.judge_authentication(True, ["10.0.0.1"]).state == OK
    assert cluster.judge_authentication(False, ["127.0.0.1", "127.0.0.2"]).state == OK
    found = cluster.judge_authentication(False, ["127.0.0.1", "10.0.0.2"])
    assert found.state == WARNING and "RAY_AUTH_MODE=token" in found.remedy


def test_dashboard() -> None:
    assert cluster.judge_dashboard(None).state == WARNING
    assert cluster.judge_dashboard(f"127.0.0.1:{free_port()}").state == WARNING
    with socket.create_server(("127.0.0.1", 0)) as place:
        assert cluster.judge_dashboard(f"127.0.0.1:{place.getsockname()[1]}").state == OK


def test_object_store_nodes_and_their_versions() -> None:
    assert cluster.judge_store(100 * 2**20).state == WARNING and cluster.judge_store(2**30).state == OK
    assert cluster.judge_silence(90).state == ERROR
    lacking = cluster.judge_failure("ModuleNotFoundError: No module named 'nemo_ray'")
    assert lacking.state == ERROR and "nemo-ray submit" in lacking.remedy
    assert cluster.judge_failure("OutOfMemoryError: killed").state == ERROR
    same, other = {"a": "torch 2.13", "b": "torch 2.13"}, {"a": "x", "b": "x", "c": "torch 2.11"}
    assert cluster.judge_sameness({"a": "x"}) == []
    assert [one.state for one in cluster.judge_sameness(same)] == [OK]
    (found,) = cluster.judge_sameness(other)
    assert found.state == WARNING and found.says == "others on c than on the rest"
