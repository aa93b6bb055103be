"""Which blocks keep their activations: the arithmetic of it. What a block takes is measured on a GPU."""

from nemo_ray.train.activations import choose_kept

KINDS = ["linear_attention", "moe"] * 3 + ["full_attention"]
COSTS = {"linear_attention": 10, "moe": 7, "full_attention": 3}


def test_experts_come_first_then_mamba():
    assert choose_kept(COSTS, KINDS, 21) == {"moe": 3, "linear_attention": 0, "full_attention": 0}
    assert choose_kept(COSTS, KINDS, 35) == {"moe": 3, "linear_attention": 1, "full_attention": 1}


def test_all_fit_or_none():
    assert choose_kept(COSTS, KINDS, 10**9) == {"moe": 3, "linear_attention": 3, "full_attention": 1}
    for room in (0, 2, -5):
        assert not any(choose_kept(COSTS, KINDS, room).values())


def test_what_is_kept_fits():
    for room in range(80):
        kept = choose_kept(COSTS, KINDS, room)
        assert sum(COSTS[kind] * count for kind, count in kept.items()) <= room
