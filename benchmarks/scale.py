"""What grows with the data: window list, plan file, order and reader, for a corpus that fits on no disk here.

The product's own functions on row counts alone: no row is read, no token made. Prints a table, for ten
billion short rows on 500 nodes of 8 GPUs unless told otherwise; `--out` writes JSON.

    python benchmarks/scale.py --rows 10e9 --nodes 500
"""

import argparse
import json
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ray.data.encode import Sample
from nemo_ray.data.manifest import DataPlan, FileInfo, SourceInfo, digest
from nemo_ray.data.order import EpochOrder, window_order
from nemo_ray.data.pack_counts import CountsWriter, KnownCounts, counts_path
from nemo_ray.data.shards import ShardStats, read_stats, write_shard
from nemo_ray.data.window_list import Span, Window, WindowList
from nemo_ray.data.windows import blocks_of

ROWS_PER_FILE = 1_000_000
ROWS_PER_GROUP = 10_000
TOKENS_PER_ROW = 60.0
SEQUENCE_LEN = 4096
PACKS_PER_WINDOW = 256
GPUS_PER_NODE = 8
STEPS = 20
SHARDS = 2_000
"""Of which the statistics are read: all would fill a disk."""


def windows_of(num_files: int, source: int, rows_per_window: int) -> Iterator[Window]:
    """The windows of Parquet files of a million rows."""
    for file in range(num_files):
        for block in blocks_of([str(file)], [[(0, ROWS_PER_FILE)]], rows_per_window, aligned=True):
            spans = tuple(
                Span(file, start // ROWS_PER_GROUP, -(-stop // ROWS_PER_GROUP), start, stop - start)
                for _, start, stop in block
            )
            yield Window(source, spans, sum(span.num_rows for span in spans), digest(source, file, spans))


def make_plan(num_rows: int) -> DataPlan:
    """Three sources: of half, three tenths and a fifth of the rows; the last has twice its weight."""
    rows_per_window = 16_384  # 256 packs, on the planner's grid
    parts = (0.5, 0.3, 0.2)
    sources, windows = [], []
    for number, part in enumerate(parts):
        num_files = max(1, round(num_rows * part / ROWS_PER_FILE))
        files = tuple(
            FileInfo(f"/data/{number}/{i:05}.parquet", f"{i:05}.parquet", digest(number, i), "parquet",
                     ROWS_PER_FILE, i * ROWS_PER_FILE)
            for i in range(num_files)
        )  # fmt: skip
        sources.append(
            SourceInfo(
                f"/data/{number}", "completion", files, num_files * ROWS_PER_FILE, 0, rows_per_window,
                TOKENS_PER_ROW, False, part * (2 if part == parts[-1] else 1),
            )
        )  # fmt: skip
        windows.append((num_files, number, rows_per_window))
    every = WindowList(window for source in windows for window in windows_of(*source))
    return DataPlan("/prepared", "f", SEQUENCE_LEN, every, WindowList(), tuple(sources), (), 0)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def measure_counts(plan: DataPlan) -> dict[str, float]:
    """What knowing the packs of every window takes of a reader: from one file, and from the shards."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        plan = replace(plan, directory=folder)
        writer = CountsWriter(plan)

        def write() -> None:
            for window in plan.windows:
                writer.add(window, PACKS_PER_WINDOW)
            writer.write()

        def ask(counts: KnownCounts) -> list[int | None]:
            return [counts.of(index) for index in range(len(plan.windows))]

        _, write_s = timed(write)
        known, read_s = timed(lambda: ask(KnownCounts(plan)))
        assert known == [PACKS_PER_WINDOW] * len(plan.windows)
        sample = Sample(np.zeros(1, np.int32), np.ones(1, np.uint8))
        paths = [str(Path(folder, f"{number}.arrow")) for number in range(SHARDS)]
        for path in paths:
            write_shard(path, [sample], [0], [[0]], ShardStats(1, 1, 1, 1, 1, 0, 0))
        _, shards_s = timed(lambda: [read_stats(path) for path in paths])
        return {
            "packs of all windows, MB": Path(counts_path(plan)).stat().st_size / 1e6,
            "packs of all windows noted, s": write_s,
            "packs of all windows read, s": read_s,
            "the same from local shards, s": shards_s / SHARDS * len(plan.windows),
        }


def measure(num_rows: int, num_nodes: int) -> dict[str, float]:
    """Figures by name; the unit is in the name."""
    plan, plan_s = timed(lambda: make_plan(num_rows))
    text, text_s = timed(lambda: json.dumps(plan.to_json()))
    pickled, pickle_s = timed(lambda: pickle.dumps(plan))
    _, unpickle_s = timed(lambda: pickle.loads(pickled))
    _, parse_s = timed(lambda: DataPlan.from_json(json.loads(text)))
    _, order_s = timed(lambda: window_order(plan, 0))
    draws, setup_s = timed(lambda: EpochOrder(plan, 0, 0, lambda window: PACKS_PER_WINDOW))
    per_step = num_nodes * GPUS_PER_NODE
    _, draw_s = timed(lambda: [draws.draw() for _ in range(STEPS * per_step)])
    place = json.dumps(draws.state())
    again = EpochOrder(plan, 0, 0, lambda window: PACKS_PER_WINDOW)
    _, restore_s = timed(lambda: again.restore(json.loads(place)))
    assert [again.draw() for _ in range(100)] == [draws.draw() for _ in range(100)]
    packs = num_rows * TOKENS_PER_ROW / SEQUENCE_LEN
    return {
        "windows": len(plan.windows),
        "packs of an epoch": packs,
        "steps of an epoch": packs / per_step,
        "planning, s (files known)": plan_s,
        "plan file, MB": len(text) / 1e6,
        "plan file written, s": text_s,
        "plan file read, s": parse_s,
        "plan sent to a worker, MB": len(pickled) / 1e6,
        "plan packed for it, s": pickle_s,
        "plan unpacked by it, s": unpickle_s,
        "order to prepare in, s": order_s,
        "an epoch begun, s": setup_s,
        "packs of a step": per_step,
        "a step's packs drawn, ms": 1e3 * draw_s / STEPS,
        "place in a checkpoint, kB": len(place) / 1e3,
        "place taken up, s": restore_s,
        **measure_counts(plan),
        "most memory of this process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=10e9)
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    figures = measure(int(arguments.rows), arguments.nodes)
    for name, value in figures.items():
        print(f"{name:<34}{value:>16,.{0 if value >= 1000 or value == int(value) else 3}f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
