"""How long from `nemo-ray submit` to the first training step: the demo's tiny model, a cluster of one node.

Starts a head of its own on loopback with 2 CPUs and hands the same job in several times, each with an
output_dir of its own, so that data is prepared each time. Prints seconds; ends with 1 where the median is
above the limit.

    python benchmarks/submit_to_step.py --times 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.nodes import nodes  # noqa: E402

CONFIG = "configs/quickstart.yaml"
KEYS = ("max_steps=4", "ray.num_workers=1", "evals_per_epoch=", "test_datasets=", "completion_prompts=")


def first_step_s(environment: dict[str, str], output_dir: Path, limit_s: float) -> float:
    """Seconds until the job's log tells of its first step. Raises RuntimeError where it never does."""
    command = [sys.executable, "-m", "nemo_ray.cli", "submit", CONFIG, f"output_dir={output_dir}", *KEYS]
    began_s = time.monotonic()
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout is not None
    told, found = [], None
    for line in job.stdout:
        told.append(line)
        if found is None and line.startswith("step 1/"):
            found = time.monotonic() - began_s
    if job.wait(limit_s) != 0 or found is None:
        raise RuntimeError("".join(told[-5:]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that the median may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="submit-to-step-") as name:
        folder = Path(name)
        with nodes(folder, 2, alone=True) as cluster:
            environment = os.environ | cluster.environment | {"RAY_ADDRESS": cluster.dashboard}
            found = [first_step_s(environment, folder / f"run-{i}", 120.0) for i in range(arguments.times)]
    print(f"{statistics.median(found):.1f} s ({', '.join(f'{one:.1f}' for one in found)})")
    return int(statistics.median(found) > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
