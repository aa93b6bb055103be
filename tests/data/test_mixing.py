"""Weights of datasets, from the configuration to what every step trains on."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ray.config.load import load_config
from nemo_ray.data.mixing import describe_mix, passes
from nemo_ray.data.probe import spread
from nemo_ray.data.reader import PackReader
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import sum_shards
from tests.data.helpers import chats, prepare_all, write_lines

STEP = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    write_lines(folder / "small.jsonl", chats(200, seed=1))
    write_lines(folder / "large.jsonl", chats(1000, seed=2))
    rows = sorted(chats(1000, seed=3, turns=1, words=40), key=lambda row: len(json.dumps(row)))
    write_lines(folder / "sorted.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows[::-1]), folder / "sorted.parquet", row_group_size=100)
    return folder


def written(
    folder: Path, base: Path, weights: list[float] | None, names: Sequence[str] = ("small", "large")
) -> Path:
    entries = [f"  - {{path: {folder / name}{'' if '.' in name else '.jsonl'}}}\n" for name in names]
    if weights is not None:
        entries = [entry.replace("}", f", weight: {w}}}") for entry, w in zip(entries, weights, strict=True)]
    path = folder / "config.yaml"
    path.write_text(f"base_model: {base}\nsequence_len: 256\ndatasets:\n{''.join(entries)}")
    return path


@pytest.mark.parametrize(("weights", "share"), [([1, 1], 0.5), ([3, 1], 0.75), (None, 200 / 1200)])
def test_every_step_trains_on_the_shares_that_weights_say(
    base: Path, folder: Path, weights: list[float] | None, share: float
) -> None:
    config = load_config(str(written(folder, base, weights)), []).config
    plan = plan_data(config.data, str(base), str(folder / "prepared"))
    prepare_all(plan, config.data, base)
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=STEP)
    steps = list(iter(reader.next_step, None))
    tokens = [
        [sum(pack.num_tokens for pack in step.packs if source in pack.sources) for source in (0, 1)]
        for step in steps
    ]
    whole = sum(a for a, _ in tokens) / sum(a + b for a, b in tokens)
    assert whole == pytest.approx(share, abs=0.02)
    packs = [sum(0 in pack.sources for pack in step.packs) for step in steps[:-1]]
    assert all(abs(count - share * STEP) <= 1.5 for count in packs), packs
    said = [line for line in plan.notices if "of an epoch's tokens" in line]
    assert said == describe_mix(plan.sources)
    if weights is None:
        assert said == [] and passes(plan.sources) == [1.0, 1.0]
    else:
        assert f"small.jsonl: {share:.1%} of an epoch's tokens" in said[0]
    rows = [plan.sources[i].num_rows for i in (0, 1)]
    seen = [sum(int((pack.sources == i).sum()) for s in steps for pack in s.packs) for i in (0, 1)]
    assert [n / size for n, size in zip(seen, rows, strict=True)] == pytest.approx(
        passes(plan.sources), rel=0.05
    )


@pytest.mark.parametrize("name", ["sorted.jsonl", "sorted.parquet"])
def test_a_file_that_is_sorted_by_length_has_its_share(base: Path, folder: Path, name: str) -> None:
    """The first 256 rows of one are 0.6 of the mean, of the other 1.5."""
    config = load_config(str(written(folder, base, [1, 1], ("large", name))), []).config
    plan = plan_data(config.data, str(base), str(folder / f"prepared-{name}"))
    prepare_all(plan, config.data, base)
    exact = sum_shards(plan, [window for window in plan.windows if window.source == 1])
    assert plan.sources[1].tokens_per_row == pytest.approx(exact.tokens / exact.rows, rel=0.05)
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=STEP)
    packs = [pack for step in iter(reader.next_step, None) for pack in step.packs if pack.num_tokens]
    thirds = [packs[i * len(packs) // 3 : (i + 1) * len(packs) // 3] for i in range(3)]
    for part, tolerance in [(packs, 0.03), *((third, 0.12) for third in thirds)]:
        share = sum(pack.num_tokens for pack in part if 1 in pack.sources)
        assert share / sum(pack.num_tokens for pack in part) == pytest.approx(0.5, abs=tolerance)


@given(
    taken=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 400)), min_size=1, max_size=12).filter(
        lambda parts: any(size for _, size in parts)
    ),
    places=st.sampled_from([8, 16]),
)
def test_probed_rows_come_from_all_over_a_source(taken: list[tuple[int, int]], places: int) -> None:
    parts = [(start, start + size) for start, size in taken]
    pieces = spread(parts, places, 256)
    rows = [(file, row) for file, first, count in pieces for row in range(first, first + count)]
    whole = [(file, row) for file, (start, stop) in enumerate(parts) for row in range(start, stop)]
    assert len(set(rows)) == len(rows) <= 256 and set(rows) <= set(whole) and rows == sorted(rows)
    if len(whole) <= 256:
        assert rows == whole
    else:
        numbers = {row: number for number, row in enumerate(whole)}
        at = sorted(numbers[row] * places // len(whole) for row in rows)
        assert {0, places - 1} <= set(at) and len(set(at)) >= places - 2, "a place in each part, about"
