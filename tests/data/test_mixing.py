"""Weights of datasets, from the configuration to what every step trains on."""

from pathlib import Path

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.data.mixing import describe_mix, passes
from nemo_ray.data.reader import PackReader
from nemo_ray.data.sources import plan_data
from tests.data.helpers import chats, prepare_all, write_lines

STEP = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    write_lines(folder / "small.jsonl", chats(200, seed=1))
    write_lines(folder / "large.jsonl", chats(1000, seed=2))
    return folder


def written(folder: Path, base: Path, weights: list[float] | None) -> Path:
    entries = [f"  - {{path: {folder / name}.jsonl}}\n" for name in ("small", "large")]
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
