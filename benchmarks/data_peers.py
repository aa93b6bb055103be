"""Preparing chats, side by side: what users do today, this package, and the tokenizer alone.

Two processes each, the same chats, tokenizer and template, in one run, in turns. Prints tokens a second:

    datasets.map    apply_chat_template with its assistant mask, num_proc=2; nothing is packed
    nemo_ray        template, masks, packing and shards, through Ray Data, Ray being up
    encode alone    Tokenizer.encode_batch_fast over the rendered text, on both cores: the limit

and how long after Ray is up the first window is ready. Ends with 1 where a ratio is below what was promised.

    python benchmarks/data_peers.py --chats 8000
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_ray import session
from nemo_ray.config.load import load_config
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import sum_shards

DEMO = Path(__file__).resolve().parents[1] / "nemo_ray" / "demo" / "assets"
CORES = 2
CHAT_CHARACTERS = 4_000
FASTER_THAN_MAP, OF_THE_LIMIT, FIRST_WINDOW_S = 1.7, 0.6, 5.0


def write_chats(path: Path, count: int) -> None:
    """Chats of about a thousand tokens: some of the demo's, one after the other."""
    chats = [json.loads(line)["messages"] for line in (DEMO / "chats.jsonl").read_text().splitlines()]
    generator = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages: list[dict[str, str]] = []
            while sum(len(message["content"]) for message in messages) < CHAT_CHARACTERS:
                messages += generator.choice(chats)
            file.write(json.dumps({"messages": messages}) + "\n")


class Contest:
    """The three, on one file of chats."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.chats = folder / "chats.jsonl"
        write_chats(self.chats, count)
        self.first_window_s: list[float] = []
        self.tokens: dict[str, int] = {}
        self._runs = 0
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "base"))
        rows = [json.loads(line)["messages"] for line in self.chats.read_text().splitlines()]
        self.rendered = self.tokenizer.apply_chat_template(rows, tokenize=False)

    def map(self) -> float:
        """Tokens a second of datasets.map."""
        import datasets

        datasets.disable_progress_bars()
        self._runs += 1
        cache = self.folder / f"cache{self._runs}"
        rows = datasets.load_dataset("json", data_files=str(self.chats), split="train", cache_dir=str(cache))
        tokenizer = self.tokenizer

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            return dict(
                tokenizer.apply_chat_template(
                    row["messages"], return_dict=True, return_assistant_tokens_mask=True
                )
            )

        began = time.perf_counter()
        done = rows.map(encode, num_proc=CORES, remove_columns=rows.column_names, load_from_cache_file=False)
        spent = time.perf_counter() - began
        self.tokens["datasets.map"] = sum(map(len, done["input_ids"]))
        return self.tokens["datasets.map"] / spent

    def ours(self) -> float:
        """Tokens a second of the pipeline."""
        from nemo_ray.data.pipeline import prepare

        self._runs += 1
        keys = {
            "base_model": str(DEMO / "base"),
            "datasets": [{"path": str(self.chats)}],
            "sequence_len": 4096,
            "dataset_prepared_path": str(self.folder / f"prepared{self._runs}"),
        }
        (self.folder / "config.yaml").write_text(json.dumps(keys))
        config = load_config(str(self.folder / "config.yaml"), []).config
        first: list[float] = []
        began = time.perf_counter()
        plan = plan_data(config.data, config.base_model, keys["dataset_prepared_path"])
        prepare(
            plan,
            config.data,
            config.base_model,
            progress=lambda so_far: first.append(time.perf_counter() - began),
        )
        spent = time.perf_counter() - began
        self.first_window_s.append(first[0])
        self.tokens["nemo_ray"] = sum_shards(plan, plan.windows).tokens
        return self.tokens["nemo_ray"] / spent

    def alone(self) -> float:
        """Tokens a second of the tokenizer."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        began, tokens = time.perf_counter(), 0
        for start in range(0, len(self.rendered), 1000):
            batch = self.rendered[start : start + 1000]
            encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens += sum(len(one.ids) for one in encoded)
        spent = time.perf_counter() - began
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokens["encode alone"] = tokens
        return tokens / spent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=8_000)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the medians count")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    environment = session.Environment()
    with tempfile.TemporaryDirectory(prefix="data-peers-") as folder:
        contest = Contest(Path(folder), arguments.chats)
        session.start_local(CORES, environment)
        try:
            rounds = [
                {"datasets.map": contest.map(), "nemo_ray": contest.ours(), "encode alone": contest.alone()}
                for _ in range(arguments.repeats)
            ]
        finally:
            session.shutdown()
            environment.restore()
    rates = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    first = statistics.median(contest.first_window_s)
    ratios = {
        "of datasets.map": (rates["nemo_ray"] / rates["datasets.map"], FASTER_THAN_MAP),
        "of encode alone": (rates["nemo_ray"] / rates["encode alone"], OF_THE_LIMIT),
    }
    for name, rate in rates.items():
        print(f"{name:<16}{rate:>14,.0f} tokens/s")
    for name, (ratio, promised) in ratios.items():
        print(f"{name:<16}{ratio:>14.2f} (promised {promised})")
    print(f"{'first window':<16}{first:>14.2f} s (promised {FIRST_WINDOW_S})")
    if arguments.out:
        report = {"rates": rates, "rounds": rounds, "first_window_s": first, "tokens": contest.tokens}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    kept = all(ratio >= promised for ratio, promised in ratios.values()) and first <= FIRST_WINDOW_S
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
