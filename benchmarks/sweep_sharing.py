"""What a sweep gains where trials share a GPU: the same trials side by side and one by one, by the command.

A hybrid of about one billion parameters with random weights, LoRA on attention, Mamba and experts, on the
demo's chats. A training job runs first: it prepares the data and compiles the kernels, for both sweeps. Both
must end with the same best trial and, to a thousandth, the same losses.

    python benchmarks/sweep_sharing.py --trials 8 --at-a-time 4
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sizes import BILLION, DEMO, NANO, SHAPES
from sweep_overhead import run

from nemo_ray.plan import count_base
from nemo_ray.targets import read_shape
from nemo_ray.train.resources import gpus_here
from nemo_ray.tune import read_result

SMALL = BILLION | {"hybrid_override_pattern": "ME*E", "hidden_size": 64, "n_routed_experts": 8}
TOLERANCE = 1e-3  # of a loss


def make_base(keys: dict[str, Any], folder: Path) -> str:
    """The folder of a model of this shape, without weights, with the demo's tokenizer."""
    shutil.copytree(DEMO / "base", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    shape = json.loads((SHAPES / f"{NANO}.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def sweep(keys: dict[str, Any], share: int, folder: Path, name: str, trials: int) -> dict[str, Any]:
    """Wall seconds, the best trial and each trial's loss and seconds; `share` trials at a time."""
    if gpus_here(os.environ):
        keys = keys | {"ray": {"num_workers": 1, "resources_per_worker": {"GPU": 1 / share}}}
    rates = [1e-3 * 2 ** (-index / 2) for index in range(trials)]
    tune = {"parameters": {"learning_rate": rates}, "search": "grid", "scheduler": "none"}
    wall_s = run("nemo_ray.tune", {**keys, "tune": tune | {"max_concurrent": share}}, folder, name)
    found = read_result(folder / name)
    return {
        "at_a_time": share,
        "wall_s": wall_s,
        "best": found.best.number,
        "losses": [trial.value for trial in found.trials],
        "trial_s": [trial.seconds for trial in found.trials],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("billion", "small"), default="billion", help="small: for a CPU")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--at-a-time", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2048, help="of a pack")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep-sharing-") as name:
        folder = Path(name)
        base = make_base(BILLION if arguments.model == "billion" else SMALL, folder / "base")
        result: dict[str, Any] = {"parameters": count_base(read_shape(base))}
        keys = {
            "base_model": base,
            "reinit_weights": True,
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj"],
            "lora_target_parameters": ["experts.up_proj", "experts.down_proj"],
            "datasets": [{"path": str(DEMO / "chats.jsonl"), "type": "chat_template"}],
            "test_datasets": [{"path": str(DEMO / "chats-heldout.jsonl"), "type": "chat_template"}],
            "dataset_prepared_path": str(folder / "prepared"),
            "sequence_len": arguments.tokens,
            "micro_batch_size": 1,
            "max_steps": arguments.steps,
            "eval_steps": arguments.steps,
            "save_steps": arguments.steps,
            "learning_rate": 1e-4,
        }
        run("nemo_ray.train", keys, folder, "first")
        for share in (arguments.at_a_time, 1):
            result[f"{share}"] = sweep(keys, share, folder, f"sweep-{share}", arguments.trials)
            print(f"{share} at a time: {result[f'{share}']['wall_s']:.1f} s", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    shared, alone = result[f"{arguments.at_a_time}"], result["1"]
    result["gain"] = alone["wall_s"] / shared["wall_s"]
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    apart = max(abs(a - b) / b for a, b in zip(shared["losses"], alone["losses"], strict=True))
    print(f"{result['gain']:.2f} times as fast; losses at most {apart:.1e} apart")
    return int(shared["best"] != alone["best"] or apart > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
