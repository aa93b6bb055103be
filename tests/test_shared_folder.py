"""Whether all nodes see the same folder: the tokens, and two nodes of one Ray whose folders differ."""

import threading
import time
from pathlib import Path

import pytest

from nemo_ray import session
from nemo_ray.config.load import LoadedConfig
from nemo_ray.config.schema import Config
from nemo_ray.errors import ClusterError
from nemo_ray.shared_folder import missing_tokens, remove_tokens, write_token
from nemo_ray.train.launch import Launch, Parts


def test_tokens_of_all_nodes_are_seen_in_one_folder_and_go_away(tmp_path: Path) -> None:
    folder = str(tmp_path / "shared")
    for node in ("a", "b"):
        write_token(folder, "check", node)
    assert missing_tokens(folder, "check", ["a", "b"], within_s=0) == []
    assert missing_tokens(folder, "check", ["a", "c"], within_s=0.3) == ["c"]
    assert missing_tokens(folder, "another", ["a"], within_s=0) == ["a"]
    remove_tokens(folder, "check")
    remove_tokens(folder, "check")
    assert list(Path(folder).iterdir()) == []


def test_a_token_that_shows_late_is_waited_for(tmp_path: Path) -> None:
    threading.Timer(0.5, write_token, (str(tmp_path), "check", "late")).start()
    started = time.monotonic()
    assert missing_tokens(str(tmp_path), "check", ["late"], within_s=10) == []
    assert time.monotonic() - started < 5


def test_a_launch_on_several_nodes_asks_them_first_and_gives_them_the_stores_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_ray.data import nodes

    given: list[dict[str, str]] = []
    asked: list[dict[str, str]] = []
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setattr(session, "connect", lambda address, env, variables, verbose: given.append(variables))
    monkeypatch.setattr(session, "nodes", lambda: [{"CPU": 4.0}, {"CPU": 4.0}])
    monkeypatch.setattr(nodes, "check_shared", asked.append)
    config = Config.model_validate(
        {
            "base_model": str(tmp_path),
            "datasets": [{"path": "rows.jsonl"}],
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": "s3://bucket/prepared",
            "ray": {"num_workers": 2},
        }
    )
    Launch(LoadedConfig(config, ()), Parts())._enter_ray("head:6379", {})
    assert given[0]["AWS_REGION"] == "eu-west-1"
    assert asked == [{"output_dir": str(tmp_path / "out"), "dataset_prepared_path": "s3://bucket/prepared"}]


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(180)
def test_two_nodes_without_a_shared_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.cluster_utils import Cluster

    from nemo_ray.data.nodes import check_shared

    cluster = Cluster()
    try:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            cluster.add_node(
                num_cpus=1, object_store_memory=80 * 2**20, env_vars={"HOME": str(tmp_path / name)}
            )
        ray.init(address=cluster.address, log_to_driver=False)
        check_shared({"output_dir": str(tmp_path / "shared")})
        assert list((tmp_path / "shared").iterdir()) == []
        with pytest.raises(ClusterError, match=r"^dataset_prepared_path: ~/prepared is not shared: node "):
            check_shared({"dataset_prepared_path": "~/prepared"}, within_s=10)
        assert not list(tmp_path.glob("*/prepared/*"))
        (tmp_path / "second" / "file").touch()
        with pytest.raises(
            ClusterError, match=r"^output_dir: ~/file cannot be written on node \S+: \w+Error"
        ):
            check_shared({"output_dir": "~/file"}, within_s=10)
    finally:
        ray.shutdown()
        cluster.shutdown()
