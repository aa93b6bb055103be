"""Whole runs of the worker's code in this process or in a few of them, without Ray: seconds each.

Over a tiny random base, chats to train on, and two held-out sets: chats and texts.
"""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_ray.config.load import load_config
from nemo_ray.data.sources import plan_data
from nemo_ray.run_dir import RunDir
from nemo_ray.train.worker import WorkerSpec, run_worker
from tests.data.helpers import prepare_all
from tests.e2e.world import ASSETS, first_lines, write_base, write_lines
from tests.group import group_of_one, run_in_group

CPU = torch.device("cpu")


class KilledError(Exception):
    """Stands for the end of the process."""


class Runs:
    """Inputs in a folder, and runs over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_base(folder / "base")
        chats = first_lines(ASSETS / "chats-heldout.jsonl", 30)
        self.train = write_lines(folder / "train.jsonl", first_lines(ASSETS / "chats.jsonl", 40))
        self.chats = write_lines(folder / "held-out-chats.jsonl", chats[:20])
        self.texts = write_lines(folder / "texts.jsonl", first_lines(ASSETS / "text.jsonl", 4))
        self._number = itertools.count()

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Six steps of two packs, evaluated every two."""
        return {
            "base_model": str(self.base),
            "datasets": [{"path": str(self.train)}],
            "test_datasets": [{"path": str(self.chats)}, {"path": str(self.texts), "type": "completion"}],
            "dataset_prepared_path": str(self.folder / "prepared"),
            "adapter": "lora",
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj"],
            "excess_length_strategy": "truncate",
            "sequence_len": 128,
            "micro_batch_size": 2,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "eval_steps": 2,
            "seed": 7,
            **changes,
        }

    def spec(self, name: str, **changes: Any) -> WorkerSpec:
        """What a worker of the run `name` is told, its data prepared and run.json begun."""
        run = RunDir(self.folder / "runs" / name)
        file = self.folder / f"{next(self._number)}.yaml"
        file.write_text(yaml.safe_dump(self.settings(output_dir=str(run.path), **changes)))
        config = load_config(str(file)).config
        plan = plan_data(config.data, config.base_model, config.dataset_prepared_path or "")
        prepare_all(plan, config.data, config.base_model)
        run.path.mkdir(parents=True, exist_ok=True)
        if not run.run_json.exists():
            run.write_run({})
        return WorkerSpec(config, plan, str(run.path))

    def run(self, name: str, *, die_at_evaluation: int | None = None, **changes: Any) -> RunDir:
        """The run `name` with one worker, in this process; it may die right after an evaluation, when the
        checkpoint of the last `save_steps` before it is there."""
        spec = self.spec(name, **changes)

        def report(figures: Mapping[str, Any]) -> None:
            if figures["step"] == die_at_evaluation:
                every = changes.get("save_steps") or figures["step"]
                _wait_for(RunDir(spec.output_dir), (figures["step"] - 1) // every * every)
                raise KilledError

        with group_of_one():
            run_worker(spec, CPU, report)
        return RunDir(spec.output_dir)

    def run_in_two(self, name: str, **changes: Any) -> RunDir:
        """The same with two workers, in processes of their own."""
        spec = self.spec(name, **changes)
        (self.folder / name).mkdir()
        run_in_group(_worker, 2, self.folder / name, spec, limit_s=120)
        return RunDir(spec.output_dir)


def _wait_for(run: RunDir, step: int) -> None:
    """Return when the checkpoint of `step` has its name; it is written while training goes on."""
    end = time.monotonic() + 60
    while step and step not in run.checkpoint_steps():
        assert time.monotonic() < end, f"no checkpoint of step {step}"
        time.sleep(0.01)


def _worker(rank: int, spec: WorkerSpec) -> None:
    run_worker(spec, CPU, _ignore)


def _ignore(figures: Mapping[str, Any]) -> None:
    pass
