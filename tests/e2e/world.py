"""A tiny base with all four block kinds, a few rows of the demo's documents, and runs over them.

The base is random, so that its loss falls quickly; its tokenizer is the demo's. The rows are two sources, a
chat and a text one, that make about 9 steps of 4 packs: the runs go on into a second epoch, and the last
step of the first is short. Three of the chats cannot be used.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_ray.config.schema import AdapterSection
from nemo_ray.demo.shapes import base_config
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.model.saving import TOKENIZER_FILES, SavedBase, save_model
from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT, TRAIN, Command

ASSETS = ROOT / "nemo_ray" / "demo" / "assets"
DEMO_BASE = ASSETS / "base"
NO_FIELD = json.dumps({"conversation": [{"role": "user", "content": "Hello?"}]})
NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "Is anybody there?"}]})
BAD_ROWS = {10: NO_FIELD, 51: NO_ANSWER, 60: "{broken"}
"""Row number to text."""
NUM_STEPS = 12
PACKS_PER_STEP = 4
_SMALL = {
    "hidden_size": 64,
    "head_dim": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "initializer_range": 0.1,
    "hybrid_override_pattern": "ME*-ME",
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
    "num_hidden_layers": 6,
}
_SETTINGS: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"],
    "lora_target_parameters": ["experts.up_proj", "experts.down_proj"],
    "excess_length_strategy": "truncate",
    "sequence_len": 256,
    "micro_batch_size": PACKS_PER_STEP,
    "max_steps": NUM_STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_steps": 6,
    "save_steps": 4,
    "seed": 7,
    "completion_prompts": ["What does os.path.join do?"],
    "completion_max_new_tokens": 4,
}


def write_base(folder: Path) -> Path:
    """A random Nemotron-H of under 1 M parameters in NVIDIA's layout, with the demo's tokenizer."""
    shape = folder.with_name(f"{folder.name}-shape")
    shape.mkdir(parents=True)
    (shape / "config.json").write_text(json.dumps({**base_config(), **_SMALL}))
    for name in TOKENIZER_FILES:
        if (DEMO_BASE / name).exists():
            shutil.copyfile(DEMO_BASE / name, shape / name)
    config, cpu = read_model_config(str(shape)), torch.device("cpu")
    model, _ = build(config, AdapterSection(), Precision(), cpu)
    fill(model, None, seed=3, device=cpu, adapter_seed=3)
    save_model(model, config, SavedBase(str(shape)), folder, torch.bfloat16, write=True)
    return folder


def first_lines(source: Path, count: int) -> list[str]:
    """The first `count` lines of a file, without their ends."""
    with open(source, encoding="utf-8") as file:
        return [line.rstrip("\n") for line in itertools.islice(file, count)]


def write_lines(path: Path, lines: list[str]) -> Path:
    """A file of these lines."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def with_bad_rows(good: list[str]) -> list[str]:
    """The same rows with BAD_ROWS put between them."""
    lines = list(good)
    for row, text in BAD_ROWS.items():
        lines.insert(row, text)
    return lines


class World:
    """One session's base, rows and prepared shards, and the runs made over them, each at most once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_base(folder / "base")
        chats = with_bad_rows(first_lines(ASSETS / "chats.jsonl", 60))
        self.chats = write_lines(folder / "chats.jsonl", chats)
        self.text = write_lines(folder / "text.jsonl", first_lines(ASSETS / "text.jsonl", 12))
        self.held_out = write_lines(
            folder / "held-out.jsonl", first_lines(ASSETS / "chats-heldout.jsonl", 20)
        )
        self.commands: list[Command] = []
        self._finished: dict[str, Command] = {}
        self._number = itertools.count()

    def settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's keys, with some replaced."""
        own = {
            "base_model": str(self.base),
            "datasets": [{"path": str(self.chats)}, {"path": str(self.text), "type": "completion"}],
            "test_datasets": [{"path": str(self.held_out)}],
            "dataset_prepared_path": str(self.folder / "prepared"),
        }
        return {**own, **_SETTINGS, **changes}

    def write_yaml(self, **changes: Any) -> Path:
        """A configuration file with the reference's keys and `changes`."""
        path = self.folder / f"run-{next(self._number)}.yaml"
        path.write_text(yaml.safe_dump(self.settings(changes), sort_keys=False))
        return path

    def run_dir(self, name: str) -> RunDir:
        """Where the run of that name goes."""
        return RunDir(self.folder / "runs" / name)

    def command(self, *arguments: str, **environment: str) -> Command:
        """Start any command; whatever it leaves is ended with the session."""
        log = self.folder / f"command-{next(self._number)}.log"
        self.commands.append(Command(arguments, log, **environment))
        return self.commands[-1]

    def train(self, name: str, *overrides: str, **changes: Any) -> Command:
        """Start `python -m nemo_ray.train` on the reference's keys with `changes`, into the run `name`."""
        config = self.write_yaml(output_dir=str(self.run_dir(name).path), **changes)
        return self.command(*TRAIN, str(config), *overrides)

    def finished(self, name: str, *overrides: str, **changes: Any) -> RunDir:
        """The run `name`, made where it does not exist yet; fails unless it ends well and cleans up."""
        if name not in self._finished:
            started = self.train(name, *overrides, **changes)
            assert started.end() == 0, started.output
            assert "Traceback" not in started.output and not started.errors, started.output
            assert started.leaves_nothing_behind(), started.tree()
            self._finished[name] = started
        return self.run_dir(name)

    def output_of(self, name: str) -> str:
        """What the command of a finished run has written."""
        return self._finished[name].output

    def end(self) -> None:
        """End what is still running."""
        for command in self.commands:
            if command.process.poll() is None or command.tree():
                command.kill_tree()
