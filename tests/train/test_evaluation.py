"""Evaluation through the worker's code: exact by dataset, whatever the split, no trace in training."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_ray.data.reader import EvalReader
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.train.loss import IGNORED, bind_loss
from nemo_ray.train.micro_batch import MicroBatch
from tests.e2e.compare import EXACT, eval_rows, train_rows
from tests.train.runs import CPU, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_losses_by_dataset_are_those_of_each_document_alone(runs: Runs) -> None:
    run = runs.run("alone", max_steps=1, eval_steps=None)
    first = eval_rows(run)[0]
    assert list(first) == ["step", "eval_loss", "eval_tokens", "eval_s", "eval_datasets"]
    assert list(first["eval_datasets"]) == ["held-out-chats", "texts"] and first["eval_s"] > 0

    spec = runs.spec("alone", max_steps=1, eval_steps=None)
    config = read_model_config(str(runs.base))
    model, _ = build(config, spec.config.adapter_config, Precision(), CPU)
    bind_loss(model)
    fill(model, str(runs.base), seed=7, device=CPU, adapter_seed=7)
    model.eval()
    found: dict[int, list[float]] = {1: [0.0, 0], 2: [0.0, 0]}
    reader = EvalReader(spec.plan, rank=0, world_size=1, packs_per_step=1)
    while (step := reader.next_step()) is not None:
        (pack,) = step.packs
        micro = MicroBatch.collate([pack], CPU)
        start = 0
        for source, length in zip(pack.sources, pack.lengths, strict=False):
            ids = micro.batch.input_ids[:, start : start + length]
            targets = micro.targets[:, start : start + length]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double()
            picked = logits.log_softmax(-1).gather(1, targets[0].clamp(min=0).unsqueeze(1)).squeeze(1)
            valid = targets[0] != IGNORED
            found[int(source)][0] -= float(picked[valid].sum())
            found[int(source)][1] += int(valid.sum())
            start += int(length)
    for (loss, tokens), own in zip(found.values(), first["eval_datasets"].values(), strict=True):
        assert own["tokens"] == tokens > 100
        assert math.isclose(own["loss"], loss / tokens, rel_tol=1e-5)
    assert first["eval_tokens"] == sum(tokens for _, tokens in found.values())
    total = sum(loss for loss, _ in found.values()) / first["eval_tokens"]
    assert math.isclose(first["eval_loss"], total, rel_tol=1e-5)


def test_the_split_over_workers_and_micro_batches_does_not_matter(runs: Runs) -> None:
    evaluated = [
        eval_rows(runs.run("size-2", max_steps=2)),
        eval_rows(runs.run("size-1", max_steps=2, micro_batch_size=1, gradient_accumulation_steps=2)),
        eval_rows(runs.run_in_two("workers-2", max_steps=2, micro_batch_size=1)),
    ]
    for rows in zip(*evaluated, strict=True):
        for row in rows[1:]:
            assert row["eval_tokens"] == rows[0]["eval_tokens"]
            assert math.isclose(row["eval_loss"], rows[0]["eval_loss"], rel_tol=1e-5)
            for name, own in row["eval_datasets"].items():
                other = rows[0]["eval_datasets"][name]
                assert own["tokens"] == other["tokens"]
                assert math.isclose(own["loss"], other["loss"], rel_tol=1e-5)
    assert len(evaluated[0]) == 2


def test_evaluations_leave_no_trace_in_training(runs: Runs) -> None:
    """Also with dropout: what is drawn at random afterwards is the same."""
    dropout = {"lora_dropout": 0.2}
    often = runs.run("often", eval_steps=1, **dropout)
    draws_after = torch.rand(3)
    never = runs.run("never", eval_steps=None, test_datasets=[], **dropout)
    assert len(eval_rows(often)) == 7 and eval_rows(never) == []
    for row, other in zip(train_rows(often), train_rows(never), strict=True):
        assert all(row[name] == other[name] for name in (*EXACT, "loss", "grad_norm", "lr"))
    assert torch.equal(draws_after, torch.rand(3))


def test_held_out_rows_of_training_sets_count_by_set(runs: Runs, tmp_path: Path) -> None:
    """Two files of one name: the second name is told apart."""
    other = tmp_path / "train.jsonl"
    other.write_bytes(runs.train.read_bytes())
    sets = [{"path": str(runs.train)}, {"path": str(other)}]
    run = runs.run("val-set", datasets=sets, test_datasets=[], val_set_size=40, max_steps=1)
    (before, after) = eval_rows(run)
    assert list(before["eval_datasets"]) == ["train", "train-2"]
    assert all(own["tokens"] > 0 for own in after["eval_datasets"].values())
