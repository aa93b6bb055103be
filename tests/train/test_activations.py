"""Which blocks keep their activations: the arithmetic of it, and which of them stand for their kind."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_ray.model.batch import PackedBatch
from nemo_ray.train import activations
from nemo_ray.train.activations import choose_kept, keep_most, keep_or_move, measure_costs
from tests.group import group_of_one, run_in_group
from tests.model.shapes import tiny_model

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


def test_a_block_before_all_adapters_does_not_stand_for_its_kind():
    model = tiny_model(adapter={"adapter": "lora", "lora_target_parameters": ("experts.up_proj",)}).train()
    batch = PackedBatch.from_lengths(torch.zeros((1, 32), dtype=torch.int64), [[32]])

    def held() -> int:
        """Bytes that autograd saves; recomputed blocks show theirs to nobody."""
        seen = {}  # by address, which none takes over while all of them live

        def count(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.packed_logits(batch)
        return sum(storage.nbytes() for storage in seen.values())

    for block in model.model.layers:
        block.recompute = True
    least = held()
    assert [block.block_type for block in model.model.layers].index("linear_attention") == 0
    costs = measure_costs(model, lambda: held() - least)
    assert set(costs) == {"linear_attention", "moe", "full_attention", "mlp"}
    activation = 32 * model.config.hidden_size * 4
    assert min(costs.values()) >= activation, costs
    assert all(block.recompute for block in model.model.layers)


def test_room_that_a_choice_leaves_is_measured_again():
    """Blocks that keep theirs need less at the peak than was thought: more of them fit."""
    layers = [SimpleNamespace(block_type=kind, recompute=True) for kind in KINDS]
    model = SimpleNamespace(model=SimpleNamespace(layers=layers))

    def peak() -> int:
        kept = [COSTS[block.block_type] for block in layers if not block.recompute]
        return 100 + sum(kept) - (8 if kept else 0)

    limit = 100 + 2 * COSTS["moe"]
    with group_of_one():
        kept = keep_most(model, COSTS, limit, peak, torch.device("cpu"))
        assert kept == {"moe": 3, "linear_attention": 0, "full_attention": 0}
        assert peak() <= limit
        assert [not block.recompute for block in layers] == [kind == "moe" for kind in KINDS]
        for block in layers:
            block.recompute = True
        kept = keep_most(model, COSTS, 100 + COSTS["moe"] + 1, peak, torch.device("cpu"))
    assert kept == {"moe": 2, "linear_attention": 0, "full_attention": 0}
    assert [block.recompute for block in layers if block.block_type == "moe"] == [True, False, False]


@pytest.mark.parametrize(
    ("fraction", "free_gib", "limit_gib"),
    [(1.0, 50, 60), (0.5, 50, 40 - 7), (1.0, 70, 80 - 7)],
    ids=["others have the rest", "a share of it", "all of it"],
)
def test_what_others_read_counts_against_a_process_share(fraction, free_gib, limit_gib, monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fraction)
    found = activations.limit_bytes(torch.device("cuda"), 7 * gib)
    assert found == limit_gib * gib - activations.SPARE_BYTES


BEHIND = 2


class Moving:
    """Notes which blocks' activations go to the host."""

    device = torch.device("cpu")
    moved: frozenset[int] = frozenset()

    def move(self, blocks: set[int]) -> None:
        self.moved = frozenset(blocks)


@pytest.mark.parametrize(
    ("room", "most", "on_gpu", "on_host"),
    [
        (1000, 1000, {"linear_attention": 4, "moe": 8}, {}),
        (4 * 8, 1000, {"moe": 3}, {"moe": 5, "linear_attention": 4}),
        (4 * 7, 1000, {}, {"moe": 8, "linear_attention": 4}),
        (4 * 7, 30, {"moe": 4}, {"moe": 4}),  # what is on its way is so where nothing is kept yet
        (4 * 7, 0, {"moe": 4}, {}),
        (8 * 7, 45, {"moe": 6, "linear_attention": 1}, {"moe": 2, "linear_attention": 3}),
        (2 * 7, 1000, {}, {"moe": 8}),  # two at a time are on their way
        (6, 1000, {}, {}),
    ],
)
def test_what_does_not_fit_goes_to_the_host_as_far_as_it_can_be_copied(
    room, most, on_gpu, on_host, monkeypatch
):
    monkeypatch.setattr(activations, "BEHIND", BEHIND)
    kinds = ["linear_attention", "moe", "moe"] * 4
    layers = [SimpleNamespace(block_type=kind, recompute=True) for kind in kinds]
    model, moving = SimpleNamespace(model=SimpleNamespace(layers=layers)), Moving()
    costs = {"linear_attention": 10, "moe": 7}

    def peak() -> int:
        sizes = [0 if block.recompute else costs[block.block_type] for block in layers]
        way = [size if index in moving.moved else 0 for index, size in enumerate(sizes)]
        kept = [size - its for size, its in zip(sizes, way, strict=True)]
        ends = range(1, len(layers) + 1)
        return 100 + max(sum(kept[:end]) + sum(way[max(0, end - BEHIND - 1) : end]) for end in ends)

    def movable(wanted: int) -> int:
        assert any(block.recompute for block in layers), "there is nothing to move"
        assert wanted == 8 * 7 + 4 * 10
        return most

    with group_of_one():
        kept = keep_or_move(model, costs, 100 + room, peak, moving, movable, 0)
    assert {kind: count for kind, count in kept.on_gpu.items() if count} == {
        kind: count for kind, count in on_gpu.items() if count
    }
    assert kept.on_host == on_host
    assert peak() <= 100 + room and sum(costs[kinds[index]] for index in moving.moved) <= most
    assert sum(not b.recompute for b in layers) == sum(on_gpu.values()) + sum(on_host.values())
    for kind, count in on_host.items():
        places = sorted(index for index in moving.moved if kinds[index] == kind)
        assert len(places) == count and places[0] == kinds.index(kind), "from the beginning"
        stay = [i for i, b in enumerate(layers) if b.block_type == kind and i not in moving.moved]
        kept_there = [index for index in stay if not layers[index].recompute]
        assert not kept_there or max(places) < min(kept_there), "before those which keep theirs"


def test_blocks_without_a_backward_pass_are_not_moved(monkeypatch):
    monkeypatch.setattr(activations, "BEHIND", 2)
    layers = [SimpleNamespace(block_type="moe", recompute=True) for _ in range(6)]
    model, moving = SimpleNamespace(model=SimpleNamespace(layers=layers)), Moving()

    def peak() -> int:
        kept = sum(not b.recompute for i, b in enumerate(layers) if i not in moving.moved)
        return 100 + 7 * kept + (2 * 7 if moving.moved else 0)

    with group_of_one():
        kept = keep_or_move(model, {"moe": 7}, 100 + 3 * 7, peak, moving, lambda wanted: 1000, 2)
    assert (kept.on_gpu, kept.on_host, moving.moved) == ({"moe": 1}, {"moe": 3}, {2, 3, 4})
    assert [block.recompute for block in layers] == [True, True, False, False, False, False]


@pytest.mark.parametrize("surplus", [1, 3, 30], ids=["a little", "more", "too much"])
def test_what_turns_out_not_to_fit_is_not_moved(surplus, monkeypatch):
    """Where moved blocks leave more on the GPU than was thought: a system that pins less memory, for one."""
    monkeypatch.setattr(activations, "BEHIND", BEHIND)
    layers = [SimpleNamespace(block_type="moe", recompute=True) for _ in range(12)]
    model, moving = SimpleNamespace(model=SimpleNamespace(layers=layers)), Moving()

    def peak() -> int:
        kept = sum(not block.recompute for i, block in enumerate(layers) if i not in moving.moved)
        return 100 + 7 * kept + surplus * len(moving.moved)

    with group_of_one():
        kept = keep_or_move(model, {"moe": 7}, 124, peak, moving, lambda wanted: 1000, 0)
    assert peak() <= 124
    assert bool(kept.on_host) == (surplus < 30) and kept.on_host.get("moe", 0) == len(moving.moved)
    assert sum(not block.recompute for block in layers) == sum(kept.on_gpu.values()) + len(moving.moved)


def choose_as_one_of_several(rank: int) -> None:
    for case in range(60):
        common, own = random.Random(case), random.Random(1000 * case + rank)
        kinds = [common.choice(["linear_attention", "moe", "full_attention"]) for _ in range(20)]
        layers = [SimpleNamespace(block_type=kind, recompute=True) for kind in kinds]
        model, moving, passes = SimpleNamespace(model=SimpleNamespace(layers=layers)), Moving(), []
        costs = {kind: own.randint(0, 30) for kind in dict.fromkeys(kinds)}
        first, limit = common.randint(0, 20), 100 + own.randint(-20, 200)

        def peak(layers=layers, moving=moving, costs=costs, own=own, passes=passes) -> int:
            passes.append("peak")
            kept = [b for index, b in enumerate(layers) if not b.recompute and index not in moving.moved]
            return 100 + sum(costs[block.block_type] for block in kept) + own.randint(0, 5)

        most = own.choice([0, 50, 10**6])
        kept = keep_or_move(model, costs, limit, peak, moving, lambda wanted, most=most: most, first)
        assert not any(kept.on_gpu.values()) or peak() <= limit + 5, "nobody takes what it has no room for"
        mine = (kept, [block.recompute for block in layers], moving.moved, len(passes))
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        assert everyone == [mine] * len(everyone), case


def test_workers_choose_the_same(tmp_path):
    """Whatever each has room and time for."""
    run_in_group(choose_as_one_of_several, 3, tmp_path, limit_s=120)
