"""What Ray's node providers lack: a spot node that the cloud refuses is started on demand instead.

Ray's autoscaler (2.60) repeats a refused request for ever, although its type has a twin on demand. A launcher
file names one of the providers made of this by `provider: {type: external, module: nemo_ray.nodes...}`; it is
then at work where `ray up` runs and in the autoscaler on the head.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar

_log = logging.getLogger(__name__)


class OnDemandInstead(ABC):
    """To be mixed into a node provider, before it."""

    REFUSALS: ClassVar[tuple[str, ...]]
    """What the cloud's errors say where spot has no capacity, no quota or another price."""

    @staticmethod
    @abstractmethod
    def on_demand(node_config: dict[str, Any]) -> dict[str, Any] | None:
        """The same node paid for on demand; None where it is already."""

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any] | None:
        """Start nodes one by one: some may be had on spot, and the rest not."""
        create = super().create_node  # type: ignore[misc]
        instead = self.on_demand(node_config)
        if instead is None:
            made: dict[str, Any] | None = create(node_config, tags, count)
            return made
        nodes: dict[str, Any] = {}
        for _ in range(count):
            try:
                one = create(node_config, tags, 1)
            except Exception as error:
                refusal = next((name for name in self.REFUSALS if name in str(error)), None)
                if refusal is None:
                    raise
                _log.warning("no spot node (%s); starting the same on demand", refusal)
                one = create(instead, tags, 1)
            nodes |= one or {}  # Azure's provider returns nothing
        return nodes
