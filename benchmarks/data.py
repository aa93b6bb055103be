"""How fast rows become packs: templating and encoding, packing, preparing whole windows, reading packs.

The product's own functions on the demo's generated chats, in one process, the tokenizer on one thread as in a
data task: a cluster does as much on each of its cores. Other data, tokenizer or length by KEY=VALUE. Prints a
table; `--out` writes JSON.

    python benchmarks/data.py sequence_len=8192
    python benchmarks/data.py base_model=models/nano datasets.0.path=data/train.jsonl --out OUT.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.packing import pack
from nemo_ray.data.prepare import encode_rows, prepare_window, read_rows, window_task
from nemo_ray.data.reader import PackReader
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import sum_shards
from nemo_ray.data.template import RowError
from nemo_ray.errors import ConfigError, NemoRayError, tell

DEMO = Path(__file__).resolve().parents[1] / "nemo_ray" / "demo" / "assets"


def configure(overrides: Sequence[str], folder: Path) -> Config:
    """The demo's chats and tokenizer in packs of 8192, or what the overrides say."""
    keys = {
        "base_model": str(DEMO / "base"),
        "datasets": [{"path": str(DEMO / "chats.jsonl")}],
        "sequence_len": 8192,
        "output_dir": str(folder),
    }
    (folder / "config.yaml").write_text(json.dumps(keys), encoding="utf-8")
    return load_config(str(folder / "config.yaml"), overrides).config


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work`, after one run that fills caches."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(config: Config, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds and tokens a second of each stage, and how full the packs are."""
    plan = plan_data(config.data, config.base_model, str(folder / "prepared"))
    tasks = [
        window_task(plan, window, config.data, config.base_model, held_out=False) for window in plan.windows
    ]
    rows = [(task, read_rows(task)) for task in tasks]

    def encode() -> list[list[int]]:
        """Lengths of each window's documents."""
        results = [encode_rows(some, t.spec, t.tokenizer, t.train_on_inputs) for t, some in rows]
        return [
            [len(sample.ids) for row in window if not isinstance(row, RowError) for sample in row]
            for window in results
        ]

    def read() -> int:
        """Tokens of an epoch, padding left out."""
        reader = PackReader(plan, seed=config.seed, num_epochs=1, rank=0, world_size=1, packs_per_step=1)
        tokens = 0
        while (found := reader.next_step()) is not None:
            tokens += sum(part.num_tokens for part in found.packs)
        return tokens

    encoded = encode()
    fitting = [[n for n in window if n <= config.sequence_len] for window in encoded]
    times = {
        "template and encode": seconds(encode, repeats),
        "pack": seconds(lambda: [pack(window, config.sequence_len) for window in fitting], repeats),
        "prepare, all of it": seconds(lambda: [prepare_window(task) for task in tasks], repeats),
        "read packs": seconds(read, repeats),
    }
    totals = sum_shards(plan, plan.windows)
    tokens = {
        "template and encode": sum(map(sum, encoded)),
        "pack": sum(map(sum, fitting)),
        "prepare, all of it": totals.tokens,
        "read packs": read(),
    }
    return {
        "stages": {
            name: {"s": times[name], "tokens": tokens[name], "tokens_per_s": tokens[name] / times[name]}
            for name in times
        },
        "windows": len(tasks),
        **totals.to_json(config.sequence_len),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each stage; the median counts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a data task
    try:
        if arguments.repeats < 1:
            raise ConfigError(f"--repeats: {arguments.repeats} is not valid; give 1 or more")
        with tempfile.TemporaryDirectory(prefix="data-") as folder:
            config = configure(arguments.overrides, Path(folder))
            result = measure(config, Path(folder), arguments.repeats)
    except NemoRayError as error:
        return tell(error)
    print(
        f"{result['documents']:,} documents, packs of {config.sequence_len:,}, on {platform.machine()}\n\n"
        f"{'':<22}{'tokens/s':>14}{'s':>10}"
    )
    for name, stage in result["stages"].items():
        print(f"{name:<22}{stage['tokens_per_s']:>14,.0f}{stage['s']:>10.4f}")
    print(f"\n{result['packs']:,} packs, {result['efficiency']:.2%} of their positions used")
    if arguments.out:
        report = {"data": config.data.model_dump(mode="json"), **result}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
