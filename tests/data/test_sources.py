import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.config.schema import DataSection
from nemo_ray.data import sources
from nemo_ray.data.files import read_span, scan, sniff_json
from nemo_ray.data.held_out import choose_fraction, choose_rows
from nemo_ray.data.manifest import DataPlan, FileFormat
from nemo_ray.data.sources import plan_data
from nemo_ray.data.window_list import Window
from nemo_ray.errors import ConfigError, DataError
from tests.data.helpers import chats, section, write_lines


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of few packs, so that small files have several."""
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)


def plan(data: DataSection, base: Path, tmp_path: Path) -> DataPlan:
    return plan_data(data, str(base), str(tmp_path / "prepared"))


def source_rows(plan: DataPlan, windows: tuple[Window, ...], source: int = 0) -> list[int]:
    """Every row of the windows, in order."""
    rows: list[int] = []
    for window in windows:
        if window.source == source:
            spans = window.source_rows(plan.sources[source])
            assert window.num_rows == sum(size for _, size in spans)
            rows += [row for first, size in spans for row in range(first, first + size)]
    return rows


def write(rows: list[Any], path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(path, rows)
    return path


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_any_span_of_a_file_reads_its_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {i}"} for i in range(150)]
    path = str(write(rows, tmp_path / f"rows{suffix}"))
    formats: dict[str, FileFormat] = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
    index = scan(path, "rows", formats[suffix])
    assert index.num_rows == 150
    for first, count in ((0, 150), (0, 16), (16, 16), (5, 1), (36, 2), (37, 37), (149, 1), (100, 50)):
        span = index.span(0, first, count)
        assert read_span(path, formats[suffix], span, ["text"]) == rows[first : first + count]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=5), max_size=80), st.booleans(), st.integers(1, 40))
def test_lines_are_counted_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ends: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = [json.dumps(text) for text in texts]
    path.write_text("\n".join(lines) + ("\n" if ends and lines else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_ray.data.lines._CHUNK_BYTES", chunk)
        index = scan(str(path), "x", "jsonl")
    assert index.num_rows == len(texts)
    for first in range(0, len(texts), 7):
        span = index.span(0, first, len(texts) - first)
        assert read_span(str(path), "jsonl", span, []) == texts[first:]


def test_a_json_file_is_lines_or_an_array(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, form in (
        ('{"a": 1}\n{"a": 2}\n', "jsonl"),
        (" \n[1]", "json"),
        ("", "jsonl"),
        ('{"a": 1}', "jsonl"),
    ):
        path.write_text(content)
        assert sniff_json(str(path), "json") == form
    path.write_text('{\n "a": 1\n}\n')
    with pytest.raises(
        DataError, match="not begin with a JSON array of rows, and its first line is no whole"
    ):
        sniff_json(str(path), "json")
    path.write_text('[1,2]\n{"a": 1}\n')
    with pytest.raises(DataError, match=r"begins with \[ and is read as one JSON array, which is no valid"):
        scan(str(path), "x", sniff_json(str(path), "json"))


@pytest.mark.parametrize(
    ("content", "form"),
    [
        ('[{"a": 1}, {"a": 2}]', "json"),
        ('[{"a": 1}, {"a": 2}]\n\n', "json"),
        ('[\n{"a": 1},\n{"a": 2}\n]\n', "json"),
        ('[{"a": 1},\n {"a":\n 2}]', "json"),
        ('\ufeff\n[{"a": "' + "x" * 200_000 + '"}]', "json"),
        ("[1,2]\n" + '{"a": 1}\n' * 3, "jsonl"),
        ('[{"a": 1}]\n' * 3, "jsonl"),
        ('[{"a": \n{"a": 2}\n', "jsonl"),
        ("[" * 5000 + '\n{"a": 2}\n', "jsonl"),
        ('{"a": \n{"a": 2}\n', "jsonl"),
        ("", "jsonl"),
    ],
    ids=lambda value: value[:12],
)
def test_a_jsonl_file_is_an_array_only_as_a_whole(tmp_path: Path, content: str, form: FileFormat) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert sniff_json(str(path), "jsonl") == form
    assert scan(str(path), "x", form).num_rows == (
        len(json.loads(content.strip("\ufeff \n"))) if form == "json" else content.count("\n")
    )


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("val", [0, 0.1, 40, 3])
def test_every_row_is_in_one_window(base: Path, tmp_path: Path, suffix: str, val: float) -> None:
    path = write(chats(700), tmp_path / f"rows{suffix}")
    made = plan(section(path, val_set_size=val), base, tmp_path)
    train, held_out = source_rows(made, made.windows), source_rows(made, made.eval_windows)
    assert sorted(train + held_out) == list(range(700))
    assert len(made.windows) > 3, "several windows, or this test shows nothing"
    assert made.sources[0].held_out_rows == len(held_out)
    assert len(held_out) == val if val >= 1 or val == 0 else 0 < len(held_out) < 210


def test_held_out_rows_are_whole_runs_and_stay_where_they_are(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_lines(folder / "b.jsonl", chats(500, seed=1))
    alone = plan(section(folder, val_set_size=0.2), base, tmp_path)
    write_lines(folder / "a.jsonl", chats(300, seed=2))
    both = plan(section(folder, val_set_size=0.2), base, tmp_path)
    held = source_rows(alone, alone.eval_windows)
    assert {row // 16 for row in held} == {run for run in range(32) if 16 * run in held}
    moved = [row - 300 for row in source_rows(both, both.eval_windows) if row >= 300]
    assert held == moved and 0 < len(held) < 500


def test_adding_a_file_leaves_the_other_windows_shards_valid(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_lines(folder / "b.jsonl", chats(500, seed=1))
    before = plan(section(folder), base, tmp_path)
    write_lines(folder / "a.jsonl", chats(500, seed=2))
    after = plan(section(folder), base, tmp_path)
    keys = {window.key for window in after.windows}
    assert {window.key for window in before.windows} < keys
    assert before.fingerprint != after.fingerprint


def test_keys_follow_all_that_shapes_a_shard_and_nothing_else(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(200))
    keys = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "length": {"sequence_len": 256},
        "unpacked": {"sample_packing": False},
        "truncate": {"excess_length_strategy": "truncate"},
        "inputs": {"train_on_inputs": True},
    }
    for name, options in variants.items():
        keys[name] = plan(section(path, **options), base, tmp_path).windows[0].key
    assert len(set(keys.values())) == len(keys)
    moved = write_lines(tmp_path / "elsewhere" / "rows.jsonl", chats(200))
    assert plan(section(moved), base, tmp_path).windows[0].key == keys["plain"]
    changed = write_lines(tmp_path / "other" / "rows.jsonl", chats(200, seed=9))
    assert plan(section(changed), base, tmp_path).windows[0].key != keys["plain"]


def test_small_files_share_windows(base: Path, tmp_path: Path) -> None:
    for number in range(30):
        write_lines(tmp_path / "set" / f"{number:02}.jsonl", chats(7, seed=number))
    made = plan(section(tmp_path / "set"), base, tmp_path)
    assert source_rows(made, made.windows) == list(range(210))
    assert len(made.windows) < 10


def test_splits_take_slices(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(300))
    for split, rows in (
        ("train[:20%]", range(60)),
        ("train[100:200]", range(100, 200)),
        ("train[-10:]", range(290, 300)),
        ("train[50%:]", range(150, 300)),
        ("train", range(300)),
    ):
        made = plan(section(path, dataset={"split": split}), base, tmp_path)
        assert source_rows(made, made.windows) == list(rows), split


def test_a_folders_split_is_the_files_named_after_it(base: Path, tmp_path: Path) -> None:
    for name, count in (("train-0", 40), ("train-1", 50), ("test", 30)):
        write_lines(tmp_path / "set" / f"{name}.jsonl", chats(count))
    sizes = {
        split: plan(section(tmp_path / "set", dataset={"split": split}), base, tmp_path).num_rows
        for split in ("train", "test", None)
    }
    assert sizes == {"train": 90, "test": 30, None: 120}
    with pytest.raises(ConfigError, match=r"datasets\[0\].split: no file is named after 'validation'"):
        plan(section(tmp_path / "set", dataset={"split": "validation"}), base, tmp_path)


def test_data_files_and_globs(base: Path, tmp_path: Path) -> None:
    for name in "abc":
        write_lines(tmp_path / "set" / f"{name}.jsonl", chats(10))
    for files, rows in ((["b.jsonl"], 10), (["[ab].jsonl"], 20), (["*.jsonl", "a.jsonl"], 30)):
        made = plan(section(tmp_path / "set", dataset={"data_files": files}), base, tmp_path)
        assert made.num_rows == rows
    with pytest.raises(ConfigError, match=r"data_files: d.jsonl matches no file"):
        plan(section(tmp_path / "set", dataset={"data_files": ["d.jsonl"]}), base, tmp_path)


def test_test_datasets_are_evaluated_only(base: Path, tmp_path: Path) -> None:
    train, test = (write_lines(tmp_path / f"{name}.jsonl", chats(90)) for name in ("train", "test"))
    made = plan(section(train, test_datasets=[{"path": str(test)}]), base, tmp_path)
    assert source_rows(made, made.windows) == source_rows(made, made.eval_windows, 1) == list(range(90))
    assert made.sources[1].evaluation_only and not made.sources[0].evaluation_only


def test_a_plan_survives_json(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(200))
    made = plan(section(path, val_set_size=0.1), base, tmp_path)
    assert DataPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


# -- choice of held-out rows ----------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 300)), min_size=1, max_size=4),
    st.floats(0.01, 0.9),
    st.integers(1, 400),
)
def test_choices_stay_within_the_rows_given(
    sizes: list[tuple[int, int]], fraction: float, count: int
) -> None:
    parts = [(f"file{i}", (start, start + size)) for i, (start, size) in enumerate(sizes)]
    total = sum(size for _, size in sizes)
    for chosen in (choose_fraction(parts, fraction), choose_rows(parts, count)):
        for (_, (first, last)), ranges in zip(parts, chosen, strict=True):
            flat = [edge for span in ranges for edge in span]
            assert flat == sorted(set(flat)), "ascending, disjoint, not adjacent, not empty"
            assert all(first <= start < stop <= last for start, stop in ranges)
    assert sum(stop - start for ranges in choose_rows(parts, count) for start, stop in ranges) == min(
        count, total
    )
    if total:
        assert any(choose_fraction(parts, fraction))


def test_a_fraction_is_met_on_many_rows() -> None:
    chosen = choose_fraction([("x", (0, 1_000_000))], 0.05)
    assert sum(stop - start for start, stop in chosen[0]) == pytest.approx(50_000, rel=0.05)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dataset", "keys", "error", "message"),
    [
        (
            [{"text": "x"}] * 5,
            {},
            {},
            ConfigError,
            r"datasets\[0\].field_messages: no row .* 'messages'; .*has text",
        ),
        (
            chats(5),
            {"type": "completion"},
            {},
            ConfigError,
            r"datasets\[0\].field: no row of .* has a field 'text'",
        ),
        ([], {}, {}, DataError, r"datasets\[0\]: .* holds no rows"),
        (chats(5), {"split": "train[5:]"}, {}, DataError, r"\(train\[5:\]\) holds no rows"),
        (
            chats(5),
            {"split": "train[a:]"},
            {},
            ConfigError,
            r"datasets\[0\].split: 'train\[a:\]' is no split",
        ),
        (chats(5), {}, {"val_set_size": 5}, ConfigError, "val_set_size: 5 holds out every row"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}] * 3,
            {},
            {},
            DataError,
            r"datasets\[0\]: none of 3 rows .*: no assistant turn",
        ),
    ],
)
def test_unusable_data_is_refused_before_anything_starts(
    base: Path, tmp_path: Path, rows: Any, dataset: Any, keys: Any, error: type[Exception], message: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(error, match=message):
        plan(section(path, dataset=dataset, **keys), base, tmp_path)


def test_paths_that_are_not_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets\[0\].path: .* is not there"):
        plan(section(tmp_path / "none.jsonl"), base, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt"):
        plan(section(tmp_path / "empty"), base, tmp_path)
    with pytest.raises(ConfigError, match=r"datasets\[0\].path: .*none-\*.jsonl matches no file"):
        plan(section(tmp_path / "none-*.jsonl"), base, tmp_path)
    (tmp_path / "rows.xls").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"datasets\[0\].ds_type: the format of .*rows.xls cannot be told"):
        plan(section(tmp_path / "rows.xls"), base, tmp_path)


def test_a_parquet_file_without_the_column(base: Path, tmp_path: Path) -> None:
    path = write([{"text": "x", "id": 1}], tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"field_messages: .* has no column 'messages'; it has text, id"):
        plan(section(path), base, tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="bad.parquet is no valid Parquet file"):
        plan(section(tmp_path / "bad.parquet"), base, tmp_path)
