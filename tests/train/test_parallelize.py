"""Every layout over four processes computes the losses, gradients and files of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_ray.config.schema import AdapterSection, TrainSection
from nemo_ray.errors import ConfigError
from nemo_ray.model.adapter import adapter_state
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.saving import SavedBase, save_model
from nemo_ray.model.selftest import self_test
from nemo_ray.train.frozen_shards import ALIGNED, FrozenShards
from nemo_ray.train.loss import IGNORED, bind_loss, next_token_targets
from nemo_ray.train.optim import clip_gradients, make_optimizer
from nemo_ray.train.parallelize import Layout, Parallel, parallelize
from tests.group import run_in_group
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config

WORLD = 4
NUM_STEPS = 3


def micro_batches() -> list[tuple[PackedBatch, torch.Tensor]]:
    """Eight packs; the last one is all masked, as where an epoch runs out."""
    generator = torch.Generator().manual_seed(100)
    found = []
    for index in range(2 * WORLD):
        ids = torch.randint(0, 8, (1, 48), generator=generator)
        batch = PackedBatch.from_lengths(ids, [[10 + index, 38 - index]])
        targets = next_token_targets(ids, batch.seq_idx)
        found.append((batch, torch.full_like(ids, IGNORED) if index == 2 * WORLD - 1 else targets))
    return found


@dataclass(frozen=True)
class Case:
    adapter: dict = field(default_factory=dict)
    precision: Precision = Precision()
    factors_whole: bool = True
    optimizer: str = "adamw_torch"
    tolerance: float = 2e-5  # of losses and gradient norms
    weights: float = 1e-3  # of what was trained


CASES = {
    "lora": Case(ALL_TARGETS),
    "lora on few": Case(
        {
            "adapter": "lora",
            "lora_target_modules": ("q_proj",),
            "lora_target_parameters": ("experts.up_proj",),
        }
    ),
    "lora, factors sharded too": Case(ALL_TARGETS, factors_whole=False),
    "4-bit, factors sharded too": Case(
        ALL_TARGETS, Precision(linears_4bit=True, experts_4bit=True), factors_whole=False
    ),
    "full": Case(),
    "whole modules and ranks": Case(
        ALL_TARGETS
        | {"lora_modules_to_save": ("lm_head", "embeddings"), "rank_pattern": {"experts.up_proj": 6}}
    ),
    "4-bit": Case(ALL_TARGETS, Precision(linears_4bit=True, experts_4bit=True)),
    "8-bit states": Case(ALL_TARGETS, optimizer="adamw_8bit"),
    # Sums over workers are taken in another order, and bf16 rounds what follows from them.
    "bf16 with float32 masters": Case(
        precision=Precision(compute=torch.bfloat16), tolerance=2e-2, weights=0.1
    ),
}


def train(
    layout: Layout, rank: int, case: Case, checkpointing: bool
) -> tuple[nn.Module, list[float], Parallel]:
    """Three steps of AdamW; returns the model and each step's loss and gradient norm."""
    world = layout.replicate * layout.shard
    model, targets = build(tiny_config(latent=32), AdapterSection(**case.adapter), case.precision, CPU)
    bind_loss(model)
    parallel = parallelize(model, layout, CPU, checkpointing, case.factors_whole)
    fill(model, None, seed=3, device=CPU, adapter_seed=4)
    parallel.hold_weights()
    self_test(model, targets, CPU, case.precision.compute)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    section = TrainSection(learning_rate=0.03, optimizer=case.optimizer)
    optimizer = make_optimizer(named, section, rank, world)
    parallel.hold_gradients(parameters)
    figures = []
    for _ in range(NUM_STEPS):
        batches = micro_batches()
        num_targets = sum(int((targets != IGNORED).sum()) for _, targets in batches)
        own = batches[rank::world]
        loss_sum = torch.zeros(())
        for index, (batch, targets) in enumerate(own):
            parallel.set_last_micro_batch(index == len(own) - 1)
            loss = -model.target_log_probs(batch, targets).sum()
            (loss * parallel.loss_scale / num_targets).backward()
            loss_sum += loss.detach()
        if world > 1:
            dist.all_reduce(loss_sum)
        parallel.sync_gradients()
        figures += [float(loss_sum) / num_targets, float(clip_gradients(parameters, 1.0))]
        optimizer.step_unless(torch.zeros(()))
        if parallel.sums_gradients:
            torch._foreach_zero_([parameter.grad for parameter in parameters])
        else:
            optimizer.zero_grad()
    return model, figures, parallel


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def parts_of(folder: Path | None) -> Iterator[list[int]]:
    """The bytes of parts that this worker holds, as they are made; with a folder, workers read each other's
    as GPUs of one host do: out of files in it."""
    held: list[int] = []
    make = FrozenShards._memory_for_parts

    def memory_for_parts(shards: FrozenShards, num_bytes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        held.append(num_bytes)
        if folder is None:
            return make(shards, num_bytes)
        ranks = dist.get_process_group_ranks(shards.group)
        files = [str(folder / f"{len(held)}-of-{rank}") for rank in ranks]
        own = torch.from_file(files[shards.rank], shared=True, size=num_bytes, dtype=torch.uint8)
        dist.barrier(group=shards.group)
        return own, [torch.from_file(file, shared=True, size=num_bytes, dtype=torch.uint8) for file in files]

    with (
        patch.object(FrozenShards, "_memory_for_parts", memory_for_parts),
        patch.object(FrozenShards, "_can_read_each_other", lambda _: folder is not None),
    ):
        yield held


def check_spread_weights(model: nn.Module, reference: nn.Module, parallel: Parallel, held: int) -> None:
    """Gathered, they are those of one worker; and a worker holds its part of them, not all."""
    whole_bytes = 0
    for ours, plain in zip(model.model.layers, reference.model.layers, strict=True):
        ours.make_whole()
        expected = dict(plain.named_parameters())
        for name, weight in ours.named_parameters():
            if not weight.requires_grad:
                assert torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8)), name
                offset = weight.data_ptr() - weight.untyped_storage().data_ptr()
                assert weight.dim() < 2 or offset % ALIGNED == 0, name
                whole_bytes += weight.nbytes if weight.dim() > 1 else 0
    assert 0 < held < 1.1 * whole_bytes / parallel.layout.shard


def compare_layouts(rank: int, folder: str, name: str) -> None:
    case = CASES[name]
    reference, expected, _ = train(Layout(1, 1), 0, case, checkpointing=False)
    assert expected[-2] < 0.95 * expected[0], expected
    files = Path(folder) / "parts"
    for layout, read_in in (
        (Layout(1, 4), None),
        (Layout(2, 2), None),
        (Layout(2, 2), files / "of two"),
        (Layout(1, 4), files / "of four"),
        (Layout(4, 1), None),
    ):
        if read_in is not None:
            if not case.adapter or not case.factors_whole:
                continue
            read_in.mkdir(parents=True, exist_ok=True)
        with parts_of(read_in) as held:
            model, figures, parallel = train(layout, rank, case, checkpointing=layout.replicate == 2)
        torch.testing.assert_close(
            torch.tensor(figures),
            torch.tensor(expected),
            rtol=case.tolerance,
            atol=1e-6,
            msg=f"{name} {layout} {figures} {expected}",
        )
        assert (parallel.frozen is not None) == (
            layout.shard > 1 and bool(case.adapter) and case.factors_whole
        )
        if parallel.frozen is not None:
            check_spread_weights(model, reference, parallel, sum(held))
            some_whole = bool(parallel.frozen._holder)
            assert some_whole == (read_in is not None and layout.shard == 2)
        for (key, ours), (_, plain) in zip(
            model.named_parameters(), reference.named_parameters(), strict=True
        ):
            if ours.requires_grad:
                # As a whole: AdamW makes a step of full size of a gradient that is all rounding.
                off = float((whole(ours) - plain.detach()).norm() / plain.detach().norm())
                assert off < case.weights, f"{name} {layout} {key} {off:.1e}"
            elif parallel.frozen is None or ".layers." not in key:
                # As bytes: what is in 4 bits may be called bfloat16, and then some of it is no number.
                assert torch.equal(whole(ours).view(torch.uint8), plain.view(torch.uint8)), key
    if case.adapter:
        state, plain = adapter_state(model), adapter_state(reference)
        assert state.keys() == plain.keys() and len(state) > (40 if case.adapter == ALL_TARGETS else 5)
    else:
        base = Path(folder) / "base"
        save_model(
            model, model.config, SavedBase(str(base)), Path(folder) / "out", torch.float32, write=rank == 0
        )


SAMPLED = "lora"
RARE = ("lora on few", "8-bit states", "4-bit, factors sharded too")


def marked(name):
    if name == SAMPLED:
        return name
    return pytest.param(name, marks=pytest.mark.soak if name in RARE else pytest.mark.long)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_four_processes_equal_one(tmp_path, name):
    base = tmp_path / "base"
    tiny_config(latent=32).save_pretrained(base)
    run_in_group(compare_layouts, WORLD, tmp_path, str(tmp_path), name, limit_s=220)
    if not CASES[name].adapter:
        saved = load_file(tmp_path / "out/model.safetensors")
        assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in saved


@pytest.mark.parametrize(
    ("world", "shard", "replicate", "expected"),
    [
        (1, None, None, Layout(1, 1)),
        (4, None, None, Layout(1, 4)),
        (4, 2, None, Layout(2, 2)),
        (4, None, 4, Layout(4, 1)),
    ],
)
def test_layout_fills_in_what_is_not_given(world, shard, replicate, expected):
    assert Layout.choose(world, shard, replicate) == expected


@pytest.mark.parametrize(
    ("world", "node", "needed", "expected"),
    [
        (8, 8, 1, Layout(8, 1)),
        (8, 8, 3, Layout(2, 4)),  # 3 does not divide it
        (8, 8, 9, Layout(1, 8)),  # no layout is enough: the one that takes the least
        (16, 8, 9, Layout(1, 16)),
        (12, 4, 3, Layout(3, 4)),  # not 3, which would lie across nodes
        (12, 6, 4, Layout(2, 6)),
        (1, 1, 2, Layout(1, 1)),
    ],
)
def test_as_few_workers_share_a_copy_as_hold_it(world, node, needed, expected):
    assert Layout.choose(world, None, None, node, lambda shard: shard >= needed) == expected
    assert Layout.choose(world, 1, None, node, lambda shard: shard >= needed) == Layout(world, 1)


@pytest.mark.parametrize(
    ("world", "shard", "replicate"), [(4, 3, None), (4, 2, 4), (2, None, 4), (6, 4, None)]
)
def test_layout_refuses_what_does_not_multiply(world, shard, replicate):
    with pytest.raises(ConfigError, match=f"number of workers, {world}"):
        Layout.choose(world, shard, replicate)
