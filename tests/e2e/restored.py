"""Models back in this process, through the parts that training itself uses, and the logits of plain ones."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_ray.config.schema import Config
from nemo_ray.model.batch import PackedBatch
from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint import load_checkpoint
from nemo_ray.train.update import Trainee
from nemo_ray.train.worker import base_precision, make_trainee
from tests.e2e.world import ASSETS, first_lines

CPU = torch.device("cpu")
LOGITS_TOLERANCE = 1e-4
"""Of the logits' standard deviation: float32 sums in another order."""


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone, which checkpoints need."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def at_the_start(run: RunDir) -> Trainee:
    """What the run's worker had before its first step, whole in this process."""
    config = Config.model_validate(run.read_run()["config"])
    config = config.model_copy(update={"dp_shard_size": None, "dp_replicate_size": None})
    trainee, _ = make_trainee(config, config.base_model, CPU, base_precision(config, CPU))
    return trainee


def at_the_end(run: RunDir) -> Trainee:
    """The same, as the run's newest checkpoint has it."""
    trainee, newest = at_the_start(run), run.newest_checkpoint()
    assert newest is not None
    state = load_checkpoint(newest, trainee.parameters, trainee.optimizer)
    assert newest.name == f"step-{state.step}"
    return trainee


def held_out_documents(base: Path, count: int = 4, longest: int = 200) -> list[list[int]]:
    """Held-out chats of the demo as token ids, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line)["messages"] for line in first_lines(ASSETS / "chats-heldout.jsonl", count)]
    return [tokenizer.apply_chat_template(row, return_dict=False)[:longest] for row in rows]


@torch.no_grad()
def packed_logits(model: nn.Module, documents: list[list[int]]) -> torch.Tensor:
    """Our eval mode's logits of all documents in one pack, (tokens, V)."""
    ids = torch.tensor([[token for document in documents for token in document]])
    batch = PackedBatch.from_lengths(ids, [[len(document) for document in documents]])
    return model.eval().packed_logits(batch)[0]


@torch.no_grad()
def plain_logits(model: nn.Module, documents: list[list[int]]) -> torch.Tensor:
    """A transformers model's logits of each document alone, one after another, (tokens, V)."""
    model.eval()
    return torch.cat([model(torch.tensor([document]), use_cache=False).logits[0] for document in documents])


def plain_model(folder: Path) -> nn.Module:
    """Plain transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of logits as a share of their standard deviation."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().std())
