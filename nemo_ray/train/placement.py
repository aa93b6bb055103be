"""Placement groups that Ray Train leaves behind when a start fails."""

import time

FREED_WITHIN_S = 20.0
_POLL_S = 0.2


def free_abandoned_groups() -> None:
    """Remove those of this job whose controller is gone, once it is.

    Ray 2.60 forgets the group of workers of which one died while it was handed its function, and keeps what
    the group holds until the job ends: the next workers would wait for it in vain.
    """
    from ray import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    until = time.monotonic() + FREED_WITHIN_S
    while not (abandoned := _abandoned()) and time.monotonic() < until:
        time.sleep(_POLL_S)
    for group in abandoned:
        remove_placement_group(PlacementGroup(PlacementGroupID(group)))


def _abandoned() -> list[bytes]:
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    job = ray.get_runtime_context().get_job_id()
    groups = [
        Group.FromString(data) for data in state._connect_and_get_accessor().get_placement_group_table()
    ]
    return [
        group.placement_group_id
        for group in groups
        if group.creator_job_id.hex() == job
        and group.creator_actor_id  # one that a driver made has none
        and group.creator_actor_dead
        and group.state != Group.REMOVED
    ]
