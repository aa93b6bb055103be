"""The learning rate as a function of progress, and when evaluations and checkpoints are due."""

import pytest

from nemo_ray.config.schema import TrainSection
from nemo_ray.train.metrics import extend_hash, passed_multiple
from nemo_ray.train.optim import learning_rate


def rates(num_steps: int = 100, **train: object) -> list[float]:
    section = TrainSection(learning_rate=1.0, **train)
    return [learning_rate(section, s, s / num_steps, (s + 1) / num_steps) for s in range(num_steps)]


@pytest.mark.parametrize("warmup", [{"warmup_steps": 10}, {"warmup_ratio": 0.1}])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_the_rate_rises_to_its_peak_and_falls(kind, warmup):
    found = rates(lr_scheduler=kind, **warmup)
    assert found[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    if kind == "constant_with_warmup":
        assert set(found[10:]) == {1.0}
    else:
        assert all(later < earlier for earlier, later in zip(found[10:], found[11:], strict=False))
        assert found[55] == pytest.approx(0.5, abs=0.01) and 0 < found[-1] < 0.02


def test_constant_has_no_warmup():
    assert set(rates(lr_scheduler="constant", warmup_steps=10)) == {1.0}


def test_the_rate_follows_rows_where_steps_are_unknown():
    """Uneven packs: the rate depends on the share of rows that is consumed, not on a number of steps."""
    section = TrainSection(learning_rate=1.0, lr_scheduler="linear", warmup_ratio=0.0)
    assert learning_rate(section, 3, 0.25, 0.3) == pytest.approx(0.75)
    assert learning_rate(section, 30, 0.25, 0.3) == pytest.approx(0.75)


def test_due_points_are_hit_once_each():
    edges = [0.0, 0.13, 0.24, 0.26, 0.51, 0.74, 0.99, 1.0, 1.3, 2.0]
    hits = [passed_multiple(a, b, 4) for a, b in zip(edges, edges[1:], strict=False)]
    assert hits == [False, False, True, True, False, True, True, True, True]
    assert not passed_multiple(0.0, 1.0, None)
    assert sum(passed_multiple(s / 7, (s + 1) / 7, 3) for s in range(21)) == 9


def test_the_hash_depends_on_order_and_history():
    first, second = ("key", 1), ("key", 2)
    whole = extend_hash(extend_hash("", [first]), [second])
    assert whole != extend_hash(extend_hash("", [second]), [first])
    assert whole != extend_hash("", [first, second])
