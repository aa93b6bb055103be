"""Nodes on demand where a cloud refuses spot: what is asked for then, and what is left to Ray."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private._azure.node_provider import AzureNodeProvider
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

from nemo_ray.nodes import aws, azure, gcp

FILES = sorted((Path(__file__).parents[2] / "cluster").glob("*.yaml"))
PROVIDERS = {
    "aws": (aws.Provider, AWSNodeProvider),
    "gcp": (gcp.Provider, GCPNodeProvider),
    "azure": (azure.Provider, AzureNodeProvider),
}
SPOT = {
    "aws": {"InstanceType": "p5.48xlarge", "InstanceMarketOptions": {"MarketType": "spot"}},
    "gcp": {"machineType": "a3-highgpu-8g", "scheduling": {"provisioningModel": "SPOT"}},
    "azure": {"azure_arm_parameters": {"vmSize": "Standard_ND96isr_H100_v5", "priority": "Spot"}},
}
REFUSED = {
    "aws": NodeLaunchException("InsufficientInstanceCapacity", "There is no Spot capacity", None),
    # What Ray raises of an operation of Compute Engine that ended with an error.
    "gcp": Exception({"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "message": "..."}]}),
    "azure": Exception("(SkuNotAvailable) The requested tier for resource is currently not available"),
}
CLOUDS = list(PROVIDERS)


class Cloud:
    """Ray's side of a provider: takes requests, and refuses some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cloud: str, refusals: list[Exception | None]) -> None:
        ours, rays = PROVIDERS[cloud]
        self.provider = ours.__new__(ours)  # without the clients of a cloud
        self.asked: list[dict[str, Any]] = []
        self._refusals = refusals

        def create_node(_: Any, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
            self.asked.append(node_config)
            assert tags == {"ray-user-node-type": "h100-spot"}
            refusal = self._refusals.pop(0) if self._refusals else None
            if refusal is not None:
                raise refusal
            names = [f"node-{len(self.asked)}-{index}" for index in range(count)]
            return None if cloud == "azure" else {name: {} for name in names}

        monkeypatch.setattr(rays, "create_node", create_node)

    def create(self, node_config: dict[str, Any], count: int = 1) -> Any:
        return self.provider.create_node(node_config, {"ray-user-node-type": "h100-spot"}, count)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_spot_type_on_demand_is_its_twin(file: Path) -> None:
    """Both of the launcher file: so what is asked for instead is what is written there."""
    raw = yaml.safe_load(file.read_text("utf-8"))
    provider, _ = PROVIDERS[file.stem.partition("-")[0]]
    assert raw["provider"]["module"] == f"{provider.__module__}.{provider.__name__}"
    types = raw["available_node_types"]
    [spot] = [name for name in types if name.endswith("-spot")]
    twin = types[spot.replace("-spot", "-on-demand")]["node_config"]
    assert provider.on_demand(types[spot]["node_config"]) == twin
    assert provider.on_demand(twin) is None and provider.on_demand(types["head"]["node_config"]) is None


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_is_refused_on_spot_is_started_on_demand(cloud, monkeypatch, caplog) -> None:
    found = Cloud(monkeypatch, cloud, [REFUSED[cloud]])
    made = found.create(SPOT[cloud])
    assert found.asked == [SPOT[cloud], found.provider.on_demand(SPOT[cloud])]
    assert made == ({} if cloud == "azure" else {"node-2-0": {}})
    assert "no spot node" in caplog.text and "on demand" in caplog.text


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_node_by_itself(cloud, monkeypatch) -> None:
    """Of three one is refused: two on spot and one on demand, not three and not five."""
    found = Cloud(monkeypatch, cloud, [None, REFUSED[cloud], None, None])
    found.create(SPOT[cloud], 3)
    plain = found.provider.on_demand(SPOT[cloud])
    assert found.asked == [SPOT[cloud], SPOT[cloud], plain, SPOT[cloud]]


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    "error", [ConnectionError("reset by peer"), Exception("AuthFailure: no permission")], ids=["net", "auth"]
)
def test_other_errors_are_rays(cloud, error, monkeypatch) -> None:
    """A request that may have been granted is not made twice."""
    found = Cloud(monkeypatch, cloud, [error])
    with pytest.raises(type(error), match=str(error)):
        found.create(SPOT[cloud])
    assert len(found.asked) == 1


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_is_refused_on_demand_too_is_rays(cloud, monkeypatch) -> None:
    found = Cloud(monkeypatch, cloud, [REFUSED[cloud], REFUSED[cloud]])
    with pytest.raises(type(REFUSED[cloud])):
        found.create(SPOT[cloud])
    assert len(found.asked) == 2


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_on_demand_are_asked_for_at_once(cloud, monkeypatch) -> None:
    found = Cloud(monkeypatch, cloud, [])
    plain = found.provider.on_demand(SPOT[cloud])
    assert found.create(plain, 2) == (None if cloud == "azure" else {"node-1-0": {}, "node-1-1": {}})
    assert found.asked == [plain]
