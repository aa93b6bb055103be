from pathlib import Path

import numpy as np
import pytest

from nemo_ray.data import sources
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.packing import IGNORED
from nemo_ray.data.prepare import encode_rows, prepare_window, window_task
from nemo_ray.data.shards import Shard, read_stats
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import TokenizerSpec
from nemo_ray.data.window_list import Window
from nemo_ray.errors import DataError
from tests.data.helpers import chat, chats, prepare_all, section, write_lines


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)


def documents(plan: DataPlan, window: Window) -> dict[int, tuple[list[int], list[int]]]:
    """Row -> (ids, labels) as the packs hold it; the packs' other arrays are checked on the way."""
    shard = Shard(plan.shard_path(window))
    found = {}
    for index in range(shard.num_packs):
        rows = shard.rows(index)
        pack = shard.pack(index, rows.astype(np.int64), 0, plan.sequence_len, plan.pad_id)
        assert pack.lengths.sum() == len(pack.input_ids) == plan.sequence_len
        stop = np.cumsum(pack.lengths)
        for number, row in enumerate(rows):
            where = slice(stop[number] - pack.lengths[number], stop[number])
            assert (pack.seq_idx[where] == number).all()
            assert pack.position_ids[where].tolist() == list(range(pack.lengths[number]))
            found[int(row)] = (pack.input_ids[where].tolist(), pack.labels[where].tolist())
        assert (pack.input_ids[pack.num_tokens :] == plan.pad_id).all()
        assert (pack.labels[pack.num_tokens :] == IGNORED).all()
        assert pack.num_targets == (pack.labels != IGNORED).sum()
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_shard_holds_every_rows_tokens(base: Path, tmp_path: Path, packing: bool) -> None:
    rows = chats(150, words=14)
    data = section(write_lines(tmp_path / "rows.jsonl", rows), sample_packing=packing)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    stats = prepare_all(plan, data, base)
    spec = TokenizerSpec.of(data, str(base))
    expected = encode_rows(rows, data.datasets[0], spec, False)
    first = dropped = 0
    for window, stat in zip(plan.windows, stats, strict=True):
        assert read_stats(plan.shard_path(window)) == stat
        found = documents(plan, window)
        for row in range(window.num_rows):
            result = expected[first + row]
            assert not isinstance(result, RowError)
            (sample,) = result
            if len(sample.ids) > 128:
                dropped += 1
                assert row not in found
                continue
            ids, labels = found[row]
            assert ids == sample.ids.tolist()
            targets = np.where(sample.targets, sample.ids, IGNORED)
            targets[0] = IGNORED
            assert labels == targets.tolist()
        first += window.num_rows
        assert packing or stat.packs == stat.documents
    assert first == 150 and sum(stat.dropped for stat in stats) == dropped
    assert 0 < dropped < 75, "some rows are too long and most are not, or this test shows less than it says"
    summary = data_statistics(plan)["train"]
    assert summary["documents"] == 150 - dropped and summary["dropped"] == dropped
    assert summary["tokens"] == sum(
        len(s.ids) for row in expected if not isinstance(row, RowError) for s in row if len(s.ids) <= 128
    )
    assert any(f"{dropped} documents dropped" in line for line in describe(data_statistics(plan)))


def test_truncate_cuts_and_counts(base: Path, tmp_path: Path) -> None:
    import random

    rows = [chat(random.Random(i), turns=1, words=200) for i in range(20)]
    rows.append(
        {"messages": [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "late"}]}
    )
    data = section(write_lines(tmp_path / "rows.jsonl", rows), excess_length_strategy="truncate")
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    (stats,) = prepare_all(plan, data, base)
    assert stats.dropped >= 1, "nothing of an answer is left of a row whose question fills the pack"
    assert 0 < stats.truncated <= 20
    assert stats.documents + stats.dropped == 21
    assert all(len(ids) <= 128 for ids, _ in documents(plan, plan.windows[0]).values())


def test_rejected_rows_are_counted_and_listed_with_their_place(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(60, words=4))
    lines = path.read_bytes().split(b"\n")
    lines[3] = b'{"text": "no messages"}'
    lines[10] = b"{broken"
    lines[11] = b'{"messages": "\xff"}'
    lines[20] = b""
    lines[33] = b'{"messages": [{"role": "user", "content": "x"}]}'
    path.write_bytes(b"\n".join(lines))
    data = section(path, val_set_size=16)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    stats = prepare_all(plan, data, base)
    windows = [*plan.eval_windows, *plan.windows]
    listed = {
        plan.locate(window, row)[1]: reason
        for window, stat in zip(windows, stats, strict=True)
        for row, reason, _ in stat.rejected_rows
    }
    assert listed == {
        3: "no field 'messages'",
        10: "invalid JSON",
        11: "invalid UTF-8",
        20: "blank line",
        33: "no assistant turn",
    }
    for stat in stats:
        assert stat.rows == stat.documents + stat.dropped + stat.num_rejected


def test_a_window_of_no_packs_is_a_shard(base: Path, tmp_path: Path) -> None:
    data = section(write_lines(tmp_path / "rows.jsonl", chats(20, words=300)), sequence_len=16)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    (stats,) = prepare_all(plan, data, base)
    assert stats.packs == stats.documents == 0 and stats.dropped == 20
    assert Shard(plan.shard_path(plan.windows[0])).num_packs == 0


def test_preparing_twice_writes_the_same_bytes(base: Path, tmp_path: Path) -> None:
    data = section(write_lines(tmp_path / "rows.jsonl", chats(40)))
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    prepare_all(plan, data, base)
    path = Path(plan.shard_path(plan.windows[0]))
    first = path.read_bytes()
    path.unlink()
    prepare_all(plan, data, base)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [f"{w.key}.arrow" for w in plan.windows]


def test_damage_and_changed_files_are_one_line(base: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", chats(40))
    data = section(source)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    source.write_text(source.read_text()[:-500])
    with pytest.raises(DataError, match="rows.jsonl has changed since"):
        prepare_window(window_task(plan, plan.windows[-1], data, str(base), held_out=False))
    path = Path(plan.shard_path(plan.windows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"ARROW1 and nothing else")
    with pytest.raises(DataError, match=r"shard .* is damaged"):
        Shard(str(path))
