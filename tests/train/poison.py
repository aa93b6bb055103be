"""Bases that make chosen packs poisonous: the embedding of a token that only they have is infinite."""

import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nemo_ray.data.packing import Pack
from nemo_ray.data.reader import EvalReader, PackReader
from nemo_ray.model.load import read_model_config
from nemo_ray.model.selftest import EDGE_INSIDE_A_CHUNK, random_ids
from nemo_ray.train.worker import WorkerSpec

EMBEDDINGS = "backbone.embeddings.weight"


def packs_by_step(spec: WorkerSpec, world_size: int = 1) -> list[tuple[Pack, ...]]:
    """All packs of each step, whichever worker reads them."""
    train = spec.config.train
    size = world_size * train.micro_batch_size * train.gradient_accumulation_steps
    reader = PackReader(
        spec.plan, seed=train.seed, num_epochs=1, rank=0, world_size=1, packs_per_step=size, timeout_s=10
    )
    found = []
    while len(found) < (train.max_steps or 0) and (step := reader.next_step()) is not None:
        found.append(step.packs)
    return found


def lonely_token(spec: WorkerSpec, step: int, pack: int, world_size: int = 1) -> int:
    """A token that is in this pack of `step`, from 1, and nowhere else in the run: not in a held-out row, nor
    in what the model is checked with."""
    steps = packs_by_step(spec, world_size)
    packs = [pack for packs in steps for pack in packs]
    held_out = EvalReader(spec.plan, rank=0, world_size=1, packs_per_step=1, timeout_s=10)
    while (more := held_out.next_step()) is not None:
        packs += more.packs
    config = read_model_config(spec.config.base_model)
    times = Counter(token for pack in packs for token in set(pack.input_ids.tolist()))
    for lengths in ((config.chunk_size, config.chunk_size), EDGE_INSIDE_A_CHUNK):
        times.update(random_ids(config.vocab_size, lengths).flatten().tolist())
    # Not the last tokens of the pack: what follows one must be predicted.
    candidates = steps[step - 1][pack].input_ids[:100].tolist()
    return next(token for token in candidates if times[token] == 1)


def poisoned(base: Path, folder: Path, *tokens: int) -> Path:
    """A copy of `base` in which the embeddings of `tokens` are infinite."""
    shutil.copytree(base, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[EMBEDDINGS][list(tokens)] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    return folder
