"""Run directories as a driver and its workers leave them, without either."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_ray.run_dir import RunDir
from nemo_ray.train.driver import Driver
from nemo_ray.train.driver_lock import FILE_NAME

SCRIPT = "</script><script>alert(1)</script><b>"
CONFIG = {
    "base_model": f"base{SCRIPT}",
    "adapter": "lora",
    "lora_r": 16,
    "output_dir": "x",
    "learning_rate": 1e-3,
}


def write_run(path: Path, num_steps: int = 40, **facts: Any) -> RunDir:
    """A run of 40 steps with evaluations at 0, 20 and 40; `facts` go into run.json."""
    run = RunDir(path)
    run.path.mkdir(parents=True)
    known = {
        "config": CONFIG,
        "world_size": 2,
        "mesh": {"replicate": 1, "shard": 2},
        "model": {"total": 2_881_608, "trainable": 262_528},
        "started_at": "2026-11-29T16:00:44+00:00",
        "notices": ["a note"],
    }
    run.write_run(known | facts)
    for step in range(num_steps + 1):
        if step:
            run.append_metrics(step_row(step))
        if step % 20 == 0:
            losses = {"a": {"loss": 4.0 - step / 40, "tokens": 5}, "b": {"loss": 3.0, "tokens": 5}}
            run.append_metrics({"step": step, "eval_loss": 4.0 - step / 50, "eval_datasets": losses})
    run.flush_metrics()
    run.append_completion({"prompt": SCRIPT, "completion": "yes", "stage": "before", "step": 0})
    return run


def step_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4.0 - step / 40,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 1000,
        "target_tokens": 600,
        "tokens_per_s": 2000.0 + step,
        "step_s": 0.5,
        "data_wait_s": 0.05,
        "peak_memory_bytes": 2**30 + step,
        "nonfinite_steps": 1,
    }


def hold(run: RunDir, driver: Driver) -> None:
    """As a driver's lock does."""
    (run.path / FILE_NAME).write_text(json.dumps(asdict(driver)))


def progress(run: RunDir, figures: Mapping[str, Any]) -> None:
    """As rank 0 says where it is."""
    run.progress_file.write_text(json.dumps(dict(figures)))
