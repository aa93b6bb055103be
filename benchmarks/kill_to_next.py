"""How long a run on this machine stands still when a worker is killed: from the kill to the next step's row.

The quickstart's model, two workers, a checkpoint every four steps; the newest worker of the run is killed
three times. Ends with 1 where one of them took longer than ten seconds. Other work beside it makes it longer.

    python benchmarks/kill_to_next.py
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workers import workers_of

ROOT = Path(__file__).resolve().parents[1]
MOST_S = 10.0
KILL_AT = (10, 40, 70)
"""Steps."""
_POLL_S = 0.05


def steps(out: Path) -> list[int]:
    """Of the rows that are there now; the last one may be half written."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["step"] for row in rows if "loss" in row]


def kill_one(run: subprocess.Popen[bytes], out: Path, limit_s: float) -> float:
    """Seconds from the kill to the first row of the workers that follow, which begin at a checkpoint."""
    before, killed_s = steps(out), time.monotonic()
    os.kill(workers_of(run.pid)[-1], signal.SIGKILL)
    fewest = len(before) + 1  # the file is cut back to the checkpoint, then it grows
    while time.monotonic() - killed_s < limit_s and run.poll() is None:
        now = len(steps(out))
        if fewest <= len(before) and now > fewest:
            return time.monotonic() - killed_s
        if now < len(before):
            fewest = min(fewest, now)
        time.sleep(_POLL_S)
    return float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds to wait for anything")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-to-next-") as name:
        out, log = Path(name) / "run", Path(name) / "log"
        command = [sys.executable, "-m", "nemo_ray.train", "configs/quickstart.yaml", f"output_dir={out}"]
        command += ["max_steps=200", "save_steps=4", "saves_per_epoch=", "evals_per_epoch=", "test_datasets="]
        command += ["completion_prompts=", "sequence_len=128", "micro_batch_size=2", "ray.num_workers=2"]
        with open(log, "w") as file:
            run = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        took: list[float] = []
        try:
            for step in KILL_AT:
                until = time.monotonic() + arguments.limit_s
                while max(steps(out), default=0) < step:
                    if run.poll() is not None or time.monotonic() > until:
                        print(log.read_text()[-2000:], file=sys.stderr)
                        return 1
                    time.sleep(_POLL_S)
                took.append(kill_one(run, out, arguments.limit_s))
                print(f"killed after step {step}: the next row after {took[-1]:.1f} s", flush=True)
        finally:
            for _ in range(2):  # the second one ends it without a checkpoint
                run.send_signal(signal.SIGINT)
                time.sleep(0.2)
            run.wait(60)
    return int(max(took) > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
