"""Which rows are rejected, where they are listed, and when a run stops for them. Without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ray.config.schema import DataSection
from nemo_ray.data import review, sources
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import prepare_window, window_task
from nemo_ray.data.review import Review, missing_windows, survey
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import DataError
from nemo_ray.visible import visible
from tests.data.helpers import chats, section, write_lines

NO_ANSWER: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)


def prepared(plan: DataPlan, data: DataSection, base: Path, **options: Any) -> list[int]:
    """What the pipeline does, one window after the other; returns the windows ready at each report."""
    ready: list[int] = []
    one = Review(plan, data.max_rejected_share, progress=lambda now: ready.append(now.windows), **options)
    found = survey(plan)
    one.add_existing(found)
    for window in missing_windows(found):
        held_out = window in plan.eval_windows
        one.add(window, prepare_window(window_task(plan, window, data, str(base), held_out=held_out)))
    one.finish()
    return ready


def plan_of(path: Path, base: Path, tmp_path: Path, **keys: Any) -> tuple[DataPlan, DataSection]:
    data = section(path, **keys)
    return plan_data(data, str(base), str(tmp_path / "prepared")), data


def rows_with_bad(count: int, bad: range) -> list[Any]:
    rows: list[Any] = chats(count, words=6)
    for row in bad:
        rows[row] = NO_ANSWER
    return rows


def test_rejected_rows_are_listed_for_the_user_and_beside_the_shards(base: Path, tmp_path: Path) -> None:
    rows = rows_with_bad(300, range(100, 103))
    path = write_lines(tmp_path / "rows.jsonl", rows)
    lines = path.read_bytes().split(b"\n")
    lines[20], lines[40] = b"", b"  "
    path.write_bytes(b"\n".join(lines))
    plan, data = plan_of(path, base, tmp_path, val_set_size=0.2)
    listing = tmp_path / "out" / "rejected.jsonl"
    prepared(plan, data, base, listing=listing)
    entries = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in entries] == [
        (str(path), row, "no assistant turn") for row in (100, 101, 102)
    ], "blank lines are no rows"
    assert plan.rejected_path.read_text() == listing.read_text()


def test_a_list_of_an_earlier_run_goes_away(base: Path, tmp_path: Path) -> None:
    plan, data = plan_of(write_lines(tmp_path / "rows.jsonl", chats(50)), base, tmp_path)
    listing = tmp_path / "rejected.jsonl"
    listing.write_text("{}\n")
    prepared(plan, data, base, listing=listing)
    assert not listing.exists()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 1.0])
def test_the_share_is_exact(base: Path, tmp_path: Path, share: float) -> None:
    plan, data = plan_of(
        write_lines(tmp_path / "rows.jsonl", rows_with_bad(200, range(150, 170))),
        base,
        tmp_path,
        max_rejected_share=share,
    )
    if share >= 0.1:  # 20 of 200: more than the share stops the run, the share itself does not
        prepared(plan, data, base)
        return
    with pytest.raises(DataError, match=r"no assistant turn \(.*rows.jsonl row 150, ") as told:
        prepared(plan, data, base)
    assert f"max_rejected_share {share:.4g} of all 200" in str(told.value)
    assert plan.rejected_path.exists() and "\n" not in str(told.value)


def test_rows_that_are_bad_through_and_through_stop_the_run_early(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "EARLY_ROWS", 100)
    rows = rows_with_bad(3000, range(10, 140))
    path = write_lines(tmp_path / "rows.jsonl", rows)
    plan, data = plan_of(path, base, tmp_path)
    assert len(plan.windows) > 20
    with pytest.raises(DataError, match="rows prepared so far were rejected, more than half, with max_rej"):
        prepared(plan, data, base)
    assert len(list(Path(plan.directory).glob("*.arrow"))) < 5
    plan, data = plan_of(path, base, tmp_path, max_rejected_share=0.5)
    prepared(plan, data, base)


def test_one_bad_window_among_good_ones_is_no_reason_to_stop(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "EARLY_ROWS", 50)
    plan, data = plan_of(
        write_lines(tmp_path / "rows.jsonl", rows_with_bad(3000, range(10, 64))), base, tmp_path
    )
    assert plan.windows[0].num_rows <= 64, "the first window is bad nearly as a whole"
    ready = prepared(plan, data, base)
    assert ready == list(range(1, len(plan.windows) + 1))


def test_dropped_and_cut_rows_are_not_rejected_ones(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*chats(80, words=40), *chats(20, words=2)])
    plan, data = plan_of(path, base, tmp_path, max_rejected_share=0.0)
    prepared(plan, data, base)
    assert not plan.rejected_path.exists()


def test_rows_that_are_all_too_long_say_so(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(50, words=200))
    plan, data = plan_of(path, base, tmp_path, sequence_len=16)
    with pytest.raises(DataError, match="every row is longer than sequence_len 16 .*; raise sequence_len"):
        prepared(plan, data, base)


def test_a_dataset_that_gives_nothing_stops_a_mixed_run(base: Path, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", chats(500, words=6))
    long = write_lines(tmp_path / "long.jsonl", chats(20, words=400))
    data = DataSection.model_validate(
        {"datasets": [{"path": str(good)}, {"path": str(long)}], "sequence_len": 128}
    )
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    with pytest.raises(DataError, match=r"none of 20 rows of .*long.jsonl can be trained on: every row is"):
        prepared(plan, data, base)


def test_no_trained_token_is_an_error(base: Path, tmp_path: Path) -> None:
    plan, _ = plan_of(write_lines(tmp_path / "rows.jsonl", chats(40, words=2)), base, tmp_path)
    one = Review(plan, 0.05)
    for window in plan.windows:
        rows = window.num_rows
        one.add(window, ShardStats(rows, rows, packs=1, tokens=rows, targets=0, dropped=0, truncated=0))
    with pytest.raises(DataError, match=r"none of the 40 tokens of 40 rows of .* is trained"):
        one.finish()


def test_shards_that_are_there_are_judged_again(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_with_bad(200, range(150, 170)))
    plan, data = plan_of(path, base, tmp_path, max_rejected_share=0.2)
    prepared(plan, data, base)
    assert not missing_windows(survey(plan))
    plan, data = plan_of(path, base, tmp_path)
    with pytest.raises(DataError, match="20 of the"):
        prepared(plan, data, base)


@given(st.text())
def test_shown_text_controls_no_terminal(text: str) -> None:
    shown = visible(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert not any(0x202A <= ord(c) <= 0x202E or 0xD800 <= ord(c) < 0xE000 for c in shown)
    shown.encode()
    printable = "".join(c for c in text if c.isprintable())
    assert visible(printable) == printable
    assert visible("\x1b[31m\r") == "␛[31m␍"
