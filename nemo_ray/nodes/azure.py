"""Azure: a regular machine where it refuses a spot machine."""

from typing import Any

from ray.autoscaler._private._azure.node_provider import AzureNodeProvider

from nemo_ray.nodes.on_demand import OnDemandInstead

_OF_SPOT = ("priority", "evictionPolicy", "billingProfile")


class Provider(OnDemandInstead, AzureNodeProvider):
    """Ray's provider for Azure, which waits for the deployment and raises what was said.

    Source of the codes: https://learn.microsoft.com/azure/virtual-machines/error-codes-spot and
    https://learn.microsoft.com/troubleshoot/azure/virtual-machines/windows/allocation-failure.
    """

    REFUSALS = (
        "SkuNotAvailable",
        "AllocationFailed",
        "OverconstrainedAllocationRequest",
        "OverconstrainedZonalAllocationRequest",
        "MaxPriceProvidedIsTooLow",
        "QuotaExceeded",
        "LowPriorityCores",
    )

    @staticmethod
    def on_demand(node_config: dict[str, Any]) -> dict[str, Any] | None:
        parameters = node_config.get("azure_arm_parameters", {})
        if parameters.get("priority") != "Spot":
            return None
        kept = {key: value for key, value in parameters.items() if key not in _OF_SPOT}
        return {**node_config, "azure_arm_parameters": kept}
