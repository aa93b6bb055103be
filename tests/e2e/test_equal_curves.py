"""How a step is split over workers, copies and micro-batches never changes what a run learns."""

from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.compare import assert_same_adapter, assert_same_course
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# All of them take 4 packs a step.
SAMPLED: dict[str, dict[str, Any]] = {
    "two-workers-sharded": {"ray": {"num_workers": 2}, "micro_batch_size": 2},
}
REST: dict[str, dict[str, Any]] = {
    "four-workers-2x2": {
        "ray": {"num_workers": 4},
        "micro_batch_size": 1,
        "dp_shard_size": 2,
        "dp_replicate_size": 2,
    },
    "two-workers-accumulation-2": {
        "ray": {"num_workers": 2},
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "two-copies": {"ray": {"num_workers": 2}, "micro_batch_size": 2, "dp_replicate_size": 2},
    "accumulation-4": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *SAMPLED.items(),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in REST.items()),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_the_same_curve_however_a_step_is_split(
    world: World, reference: RunDir, name: str, changes: dict[str, Any]
) -> None:
    run = world.finished(name, **changes)
    assert run.read_run()["world_size"] == changes.get("ray", {"num_workers": 1})["num_workers"]
    assert_same_course(run, reference)
    assert_same_adapter(run, reference)


@pytest.mark.soak
def test_the_same_yaml_and_seed_twice(world: World, reference: RunDir) -> None:
    again = world.finished("again")
    assert_same_course(again, reference, rtol=1e-5)
    assert_same_adapter(again, reference, tolerance=1e-5)


@pytest.mark.soak
def test_another_seed_is_another_run(world: World, reference: RunDir) -> None:
    """What the comparisons would find, if it were there."""
    other = world.finished("other-seed", seed=8)
    with pytest.raises(AssertionError):
        assert_same_course(other, reference)
    with pytest.raises(AssertionError):
        assert_same_adapter(other, reference)
