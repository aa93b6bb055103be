"""A frozen base spread over GPUs, fetched by copy engines and by NCCL: what the whole model computes."""

import pytest
import torch
import torch.distributed as dist

from nemo_ray.config.schema import AdapterSection
from nemo_ray.doctor.exactness import untuned
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.train.frozen_shards import FrozenShards
from nemo_ray.train.graph import CudaRecorder, GraphedPasses
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.micro_batch import MicroBatch
from tests.gpu.test_step_gpu import FOUR_BITS, SHAPE
from tests.group import run_in_group
from tests.model.shapes import ALL_TARGETS, randomize_lora, tiny_config
from tests.train.test_graph import LAYOUTS, micro_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PATTERN = "MEMEM*EME-M*ME"  # more blocks of a kind than there are buffers


def moved(micro: MicroBatch, device: torch.device) -> MicroBatch:
    batch = micro.batch
    on_gpu = type(batch)(
        batch.input_ids.to(device), batch.seq_idx.to(device), batch.cu_seqlens.to(device), batch.max_seqlen
    )
    return MicroBatch(on_gpu, micro.targets.to(device))


def compare(rank: int, by_copies: bool, in_turns: bool, four_bits: bool) -> None:
    if not by_copies:
        FrozenShards._can_read_each_other = lambda _: False
    elif not in_turns:  # as more than two workers do
        FrozenShards._divide = lambda shards: [(index,) for index in range(len(shards.blocks))]
    with untuned():  # or each process would try all tilings
        compare_models(rank, by_copies, in_turns, four_bits)


def compare_models(rank: int, by_copies: bool, in_turns: bool, four_bits: bool) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    group = dist.new_group(backend="nccl")
    precision = Precision(torch.bfloat16, torch.bfloat16, **(FOUR_BITS if four_bits else {}))
    config = tiny_config(latent=64, pattern=PATTERN, **SHAPE)

    def make(spread: bool):
        model, _ = build(config, AdapterSection(**ALL_TARGETS), precision, device)
        bind_loss(model)
        shards = FrozenShards(model, group, device) if spread else None
        fill(model, None, seed=3, device=device, adapter_seed=3)
        if shards is not None:
            shards.hold(model)
            weights = [weight for of_block in shards._weights for weight in of_block]
            assert weights
            assert all((len(weight.sources) == len(weight.gathered)) == by_copies for weight in weights)
            assert bool(shards._holder) == (by_copies and in_turns)
        randomize_lora(model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model.train(), parameters, shards

    whole, expected_of, _ = make(spread=False)
    spread, parameters, shards = make(spread=True)
    for block, layer in enumerate(whole.model.layers):
        named = dict(layer.named_parameters())
        for name, weight in spread.model.layers[block].named_parameters():
            if not weight.requires_grad and weight.dim() > 1:
                spread.model.layers[block].make_whole()
                torch.cuda.synchronize()
                assert torch.equal(weight.view(torch.uint8), named[name].view(torch.uint8)), (block, name)

    def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        assert (found - expected).norm() <= 2e-3 * expected.norm(), f"{what} of rank {rank}"

    for recompute in (False, True):
        for model in (whole, spread):
            for block in model.model.layers:
                block.recompute = recompute
        for seed, lengths in enumerate(LAYOUTS):
            micro = moved(micro_batch(lengths, seed), device)
            for model in (whole, spread):
                model.zero_grad(set_to_none=True)
                # Nothing of the pass may be left: what adds up gradients is recorded anew, on another stream.
                model.target_log_probs(micro.batch, micro.targets).sum().backward()
            for name, parameter in parameters.items():
                close(parameter.grad, expected_of[name].grad, f"{name} {recompute} {lengths}")

    passes = [
        GraphedPasses(model, its, device, CudaRecorder())
        for model, its in ((whole, expected_of), (spread, parameters))
    ]
    for _ in range(3):
        for lengths in LAYOUTS[:3]:
            for graphed in passes:
                graphed(micro_batch(lengths, 7), 0.5)
            with torch.no_grad():  # between replays the buffers hold other blocks
                micro = moved(micro_batch(LAYOUTS[1], 5), device)
                close(
                    *(model.target_log_probs(micro.batch, micro.targets) for model in (spread, whole)), "eval"
                )
        for name, parameter in parameters.items():
            close(parameter.grad, expected_of[name].grad, f"{name} recorded")
        for graphed in passes:
            graphed.zero_gradients()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("by_copies", "in_turns", "four_bits"),
    [(True, True, False), (True, True, True), (True, False, False), (False, False, False)],
    ids=["blocks in turns", "blocks of 4 bits in turns", "rows", "rows by nccl"],
)
def test_a_spread_base_computes_what_a_whole_one_does(tmp_path, by_copies, in_turns, four_bits):
    world = min(2, torch.cuda.device_count())
    in_turns = in_turns and world == 2
    run_in_group(compare, world, tmp_path, by_copies, in_turns, four_bits, limit_s=280)
