"""Google Cloud: a standard instance where Compute Engine refuses a spot instance."""

from typing import Any

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

from nemo_ray.nodes.on_demand import OnDemandInstead

_OF_SPOT = ("provisioningModel", "instanceTerminationAction")


class Provider(OnDemandInstead, GCPNodeProvider):
    """Ray's provider for Google Cloud, which waits until an instance is made and raises what was said.

    Source of the codes: https://cloud.google.com/compute/docs/troubleshooting/troubleshooting-vm-creation.
    """

    REFUSALS = ("RESOURCE_POOL_EXHAUSTED", "insufficientCapacity", "QUOTA_EXCEEDED", "quotaExceeded")

    @staticmethod
    def on_demand(node_config: dict[str, Any]) -> dict[str, Any] | None:
        scheduling = node_config.get("scheduling", {})
        if scheduling.get("provisioningModel") != "SPOT":
            return None
        kept = {key: value for key, value in scheduling.items() if key not in _OF_SPOT}
        return {**node_config, "scheduling": kept}
