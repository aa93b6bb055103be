"""AWS: an on-demand instance where EC2 refuses a spot instance."""

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from nemo_ray.nodes.on_demand import OnDemandInstead


class Provider(OnDemandInstead, AWSNodeProvider):
    """Ray's provider for AWS, which tries every zone of the file before it gives up.

    Source of the codes: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html.
    """

    REFUSALS = (
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientCapacity",
        "UnfulfillableCapacity",
        "SpotMaxPriceTooLow",
        "MaxSpotInstanceCountExceeded",
    )

    @staticmethod
    def on_demand(node_config: dict[str, Any]) -> dict[str, Any] | None:
        if node_config.get("InstanceMarketOptions", {}).get("MarketType") != "spot":
            return None
        return {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
