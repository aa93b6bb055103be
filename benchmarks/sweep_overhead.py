"""What a trial of a sweep costs beyond the plain training job, one at a time, through both commands.

Trains the quickstart's model a few steps: as a job of its own, and as each trial of a sweep of three, over
the same prepared data. The sweep's own start and end are shared by its trials. Ends with 1 where a trial
takes both 10 s and 15% longer than the job.

    python benchmarks/sweep_overhead.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "configs" / "sweep-quickstart.yaml"
NUM_TRIALS = 3
MOST_S, MOST_SHARE = 10.0, 0.15


def run(module: str, keys: dict[str, Any], folder: Path, name: str) -> float:
    """Seconds that the command took."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**keys, "output_dir": str(folder / name)}))
    began_s = time.perf_counter()
    command = [sys.executable, "-m", module, str(config)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    keys = yaml.safe_load(SWEEP.read_text())
    del keys["tune"]
    steps = {"max_steps": arguments.steps, "eval_steps": arguments.steps, "save_steps": arguments.steps}
    rates = [keys["learning_rate"] * factor for factor in (1.0, 0.5, 0.25)]
    tune = {
        "parameters": {"learning_rate": rates},
        "search": "grid",
        "scheduler": "none",
        "max_concurrent": 1,
    }
    with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as name:
        folder = Path(name)
        keys |= {**steps, "dataset_prepared_path": str(folder / "prepared")}
        run("nemo_ray.train", keys, folder, "prepare")
        before_s = run("nemo_ray.train", keys, folder, "before")
        sweep_s = run("nemo_ray.tune", {**keys, "tune": tune}, folder, "sweep")
        after_s = run("nemo_ray.train", keys, folder, "after")
        trials_s = json.loads((folder / "sweep" / "sweep.json").read_text())["trial_seconds"]
    job_s = statistics.mean((before_s, after_s))
    more_s = sweep_s / NUM_TRIALS - job_s
    print(f"the job               {job_s:8.1f} s ({before_s:.1f} before the sweep, {after_s:.1f} after)")
    print(f"a trial, all in all   {sweep_s / NUM_TRIALS:8.1f} s ({more_s:+.1f} s, {more_s / job_s:+.0%})")
    print(f"a trial's own process {statistics.mean(trials_s):8.1f} s ({trials_s})")
    if arguments.out:
        report = {"job_s": [before_s, after_s], "sweep_s": sweep_s, "trial_seconds": trials_s}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if more_s > MOST_S and more_s > MOST_SHARE * job_s else 0


if __name__ == "__main__":
    sys.exit(main())
