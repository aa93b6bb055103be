"""When the weights of a spread base are fetched: ahead of their use, and never over those that are in use.

What they compute is compared in test_parallelize.py, over four processes, and on GPUs in tests/gpu. Here
clocks stand for CUDA's streams, and let one process on a CPU take the way of a GPU.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.selftest import random_ids
from nemo_ray.train import offload
from nemo_ray.train.frozen_shards import BUFFERS, FrozenShards
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.offload import HostActivations
from tests.group import group_of_one
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config
from tests.train.clocks import Races, Stream, use_clocks

PATTERN = "MEMEM*EMEMME*EE-ME"  # two of a kind in a row too
BATCH = PackedBatch.from_lengths(random_ids(128, (17, 23)), [[17, 23]])


def spread(
    monkeypatch: pytest.MonkeyPatch, in_turns: bool = False, **adapter: object
) -> tuple[torch.nn.Module, FrozenShards]:
    """By rows, over one worker; or as the first of two that hold blocks in turns, where this one's stand for
    those of the other."""
    use_clocks(monkeypatch)
    model, _ = build(
        tiny_config(pattern=PATTERN), AdapterSection(**(ALL_TARGETS | adapter)), Precision(), CPU
    )
    bind_loss(model)
    if in_turns:
        units = [
            tuple(places[at : at + 2])
            for places in ([index for index, its in enumerate(PATTERN) if its == kind] for kind in "ME*-")
            for at in range(0, len(places), 2)
        ]
        make = FrozenShards._memory_for_parts
        monkeypatch.setattr(FrozenShards, "_divide", lambda _: units)
        monkeypatch.setattr(
            FrozenShards, "_memory_for_parts", lambda *args: (make(*args)[0], [make(*args)[0]] * 2)
        )
    shards = FrozenShards(model, dist.group.WORLD, CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    shards.hold(model)
    shards._stream = Stream("copies")
    return model.train(), shards


@pytest.fixture
def one_worker() -> Iterator[None]:
    with group_of_one():
        yield


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """("fetch", block) and ("use", block), in order; a fetch of what is there is none."""
    found: list[tuple[str, int]] = []
    fetch, use = FrozenShards._fetch, FrozenShards._use

    def _fetch(shards: FrozenShards, index: int) -> None:
        buffer = shards._buffer_of[index]
        if buffer is not None and buffer.block != index:
            found.append(("fetch", index))
        fetch(shards, index)

    def _use(shards: FrozenShards, index: int, coming: range) -> None:
        use(shards, index, coming)
        buffer = shards._buffer_of[index]
        assert buffer is None or buffer.block == index  # whatever was fetched ahead
        found.append(("use", index))

    monkeypatch.setattr(FrozenShards, "_fetch", _fetch)
    monkeypatch.setattr(FrozenShards, "_use", _use)
    return found


def passes(model: torch.nn.Module, told: list[tuple[str, int]]) -> tuple[list, list]:
    """What a forward and a backward pass do."""
    told.clear()
    loss = model.target_log_probs(BATCH, BATCH.input_ids).sum()
    forward = told.copy()
    told.clear()
    loss.backward()
    return forward, told.copy()


def uses(events: list[tuple[str, int]]) -> list[int]:
    return [block for what, block in events if what == "use"]


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("in_turns", [False, True], ids=["rows", "blocks in turns"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_blocks_are_fetched_before_they_are_needed(recompute, in_turns, told, monkeypatch):
    model, shards = spread(monkeypatch, in_turns)
    for block in model.model.layers:
        block.recompute = recompute
    count = len(PATTERN)
    forward, backward = passes(model, told)
    assert uses(forward) == list(range(count))
    assert uses(backward) == list(reversed(range(count)))  # once each, also where blocks compute again
    for events, first in ((forward, 0), (backward, count - 1)):
        fetched = [block for what, block in events if what == "fetch"]
        assert fetched == sorted(fetched, reverse=first != 0), "in the order of their use"
        fetched_late = [
            block
            for at, (what, block) in enumerate(events)
            if what == "fetch" and block != first and ("use", block) in events[at : at + 2]
        ]
        # Only what has no buffer yet: a third of one kind in a row.
        assert len(fetched_late) <= PATTERN.count("EE") + PATTERN.count("MM"), events
    fetched = {index for index in range(count) if shards._buffer_of[index] is not None}
    assert {block for what, block in forward if what == "fetch"} == fetched
    assert {PATTERN[block] for block in set(range(count)) - fetched} == (set("ME*") if in_turns else set())
    # The last ones are there still.
    assert len([1 for what, _ in backward if what == "fetch"]) < len(fetched)


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("in_turns", [False, True], ids=["rows", "blocks in turns"])
def test_every_pass_fetches_the_same(in_turns, told, monkeypatch):
    """A recorded one does, whatever was in the buffers when it was recorded."""
    model, _ = spread(monkeypatch, in_turns)
    first = passes(model, told)
    assert passes(model, told) == first
    with torch.no_grad():
        model.target_log_probs(BATCH, BATCH.input_ids)
    assert passes(model, told) == first
    model.model.layers[3](torch.randn(1, 40, model.config.hidden_size), packed=BATCH)  # as the self-test does
    assert passes(model, told) == first


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("in_turns", [False, True], ids=["rows", "blocks in turns"])
@pytest.mark.parametrize("to_host", [False, True], ids=["all on the GPU", "activations on the host"])
def test_blocks_wait_for_their_weights_and_copies_for_the_blocks_before(in_turns, to_host, monkeypatch):
    model, shards = spread(monkeypatch, in_turns)
    monkeypatch.setattr(offload, "LEAST_BYTES", 2**10)
    moving = HostActivations(model, CPU)
    moving._stream = Stream("activations")
    buffers = {id(buffer): buffer.memory for buffer in shards._buffer_of if buffer is not None}
    races = Races(list(buffers.values()))
    shards._gather = races.writing(shards._gather, lambda weight: weight.gathered)
    for number in range(6):
        for index, block in enumerate(model.model.layers):
            block.recompute = (index + number) % 3 == 0
        if to_host:
            moving.move([i for i, block in enumerate(model.model.layers) if not block.recompute])
        with races:
            loss = model.target_log_probs(BATCH, BATCH.input_ids).sum()
            if number % 3:  # else what was fetched ahead is not used
                loss.backward()
            with torch.no_grad():
                model.target_log_probs(BATCH, BATCH.input_ids)
    assert races.found == [] and races.reads > 100
    assert races.writers == {"copies"}
    assert bool(moving.host_bytes) == to_host


def units(
    pattern: str, size: int = 2, readable: bool = True, unlike: int | None = None
) -> list[tuple[int, ...]]:
    """How the blocks of a pattern are divided; block `unlike` has a weight of another shape."""
    shards = SimpleNamespace(size=size, _readable=readable, blocks=[])
    for index, kind in enumerate(pattern):
        block = torch.nn.Linear(2, 3 if index == unlike else 2).requires_grad_(False)
        block.block_type = kind
        shards.blocks.append(block)
    return FrozenShards._divide(shards)


def test_blocks_are_divided_in_pairs_of_a_kind():
    assert units("MEMEM*") == [(0,), (2, 4), (1, 3), (5,)]  # one that is left over is the first
    assert units("MEME", unlike=3) == [(0, 2), (1,), (3,)]
    for rows in (units("MEME", size=3), units("MEME", size=4), units("MEME", readable=False)):
        assert sorted(rows) == [(0,), (1,), (2,), (3,)]


@pytest.mark.usefixtures("one_worker")
def test_nothing_is_fetched_for_blocks_without_a_backward_pass(told, monkeypatch):
    few = {"lora_target_linear": False, "lora_target_modules": ("q_proj",), "lora_target_parameters": ()}
    model, shards = spread(monkeypatch, **few)
    _, backward = passes(model, told)
    assert shards.reached_first == PATTERN.index("*")
    assert {block for _, block in backward} == set(range(PATTERN.index("*"), len(PATTERN)))
    _, shards = spread(monkeypatch, **few, lora_modules_to_save=("embeddings",))
    assert shards.reached_first == 0  # gradients go through all blocks to the embeddings


@pytest.mark.usefixtures("one_worker")
def test_two_blocks_of_each_kind_are_held(monkeypatch):
    model, shards = spread(monkeypatch)
    places = {weights[0].gathered.untyped_storage().data_ptr() for weights in shards._weights}
    kinds = {block.block_type for block in model.model.layers}
    assert len(places) == sum(min(BUFFERS, PATTERN.count(kind)) for kind in "ME*-")
    assert len(kinds) == 4
