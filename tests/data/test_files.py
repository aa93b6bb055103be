"""Every format of file: rows by any span, whatever the chunks; compressed, saved, damaged and odd ones."""

import bz2
import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ray.config.schema import DataSection
from nemo_ray.data import sources
from nemo_ray.data.files import BLANK_LINE, read_span, scan
from nemo_ray.data.manifest import DataPlan, FileFormat
from nemo_ray.data.prepare import read_rows, window_task
from nemo_ray.data.sources import plan_data
from nemo_ray.data.template import RowError
from nemo_ray.errors import ConfigError, DataError
from tests.data.helpers import chats, prepare_all, section, write_lines

SPANS = ((0, 150), (0, 16), (16, 16), (5, 1), (36, 2), (37, 37), (149, 1), (100, 50))


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: list[Any], stream: bool) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=37)
    return sink.getvalue()


def as_parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=37)
    return sink.getvalue()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS: dict[str, tuple[FileFormat, Callable[[list[Any]], bytes]]] = {
    "jsonl": ("jsonl", as_lines),
    "csv": ("csv", as_csv),
    "tsv": ("tsv", lambda rows: as_csv(rows, "\t")),
    "text": ("text", lambda rows: "".join(row["text"] + "\n" for row in rows).encode()),
    "parquet": ("parquet", as_parquet),
    "arrow file": ("arrow", lambda rows: as_arrow(rows, stream=False)),
    "arrow stream": ("arrow", lambda rows: as_arrow(rows, stream=True)),
}


def plan(data: DataSection, base: Path, tmp_path: Path) -> DataPlan:
    return plan_data(data, str(base), str(tmp_path / "prepared"), say=lambda text: None)


def all_rows(data: DataSection, base: Path, tmp_path: Path) -> list[Any]:
    made = plan(data, base, tmp_path)
    tasks = [window_task(made, window, data, str(base), held_out=False) for window in made.windows]
    return [row for task in tasks for row in read_rows(task)]


# -- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_any_span_of_a_file_reads_its_rows(tmp_path: Path, kind: str) -> None:
    form, write = WRITERS[kind]
    rows = [
        {"text": f"row {i} é" + ("" if form == "text" else '\n"quoted", \t') * (i % 3)} for i in range(150)
    ]
    path = tmp_path / "rows"
    path.write_bytes(write(rows))
    index = scan(str(path), "rows", form)
    assert index.num_rows == 150
    for first, count in SPANS:
        span = index.span(0, first, count)
        assert read_span(str(path), form, span, ["text"]) == rows[first : first + count], (first, count)


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.text(alphabet='ab,"\n\r\t é', max_size=6)] * 2), min_size=1, max_size=60),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
)
def test_csv_rows_are_those_of_the_writer(
    tmp_path_factory: pytest.TempPathFactory,
    fields: list[tuple[str, str]],
    line_end: str,
    quoting: Any,
    bom: bool,
) -> None:
    if quoting == csv.QUOTE_MINIMAL:  # this writer leaves a lone carriage return bare
        fields = [(a.replace("\r", ""), b.replace("\r", "")) for a, b in fields]
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, lineterminator=line_end, quoting=quoting)
        writer.writerow(["a", "b"])
        writer.writerows(fields)
    index = scan(str(path), "x", "csv")
    wanted = [{"a": a, "b": b} for a, b in fields]
    assert index.num_rows == len(fields)
    for first in range(0, len(fields), 7):
        got = read_span(str(path), "csv", index.span(0, first, len(fields) - first), [])
        assert got == wanted[first:]


def test_a_large_file_is_scanned_by_several_threads_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "x" * (i % 90)} for i in range(4000)])
    alone = scan(str(path), "x", "jsonl")
    monkeypatch.setattr("nemo_ray.data.lines.PARALLEL_BYTES", 1)
    monkeypatch.setattr("nemo_ray.data.lines._CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr("nemo_ray.data.lines._BLOCK_BYTES", 1 << 10)
    index = scan(str(path), "x", "jsonl")
    assert index.num_rows == alone.num_rows == 4000
    assert all(index.span(0, row, 1) == alone.span(0, row, 1) for row in range(0, 4000, 16))


def test_lists_of_numbers_come_as_arrays(tmp_path: Path) -> None:
    rows = [
        {"input_ids": list(range(i)), "labels": None if i == 3 else [-100] * i, "text": "x"} for i in range(9)
    ]
    path = tmp_path / "x.parquet"
    path.write_bytes(as_parquet(rows))
    index = scan(str(path), "x", "parquet")
    got = read_span(str(path), "parquet", index.span(0, 2, 7), ["input_ids", "labels", "missing"])
    assert [set(row) for row in got] == [{"input_ids", "labels"}] * 7
    for row, wanted in zip(got, rows[2:], strict=True):
        assert isinstance(row["input_ids"], np.ndarray) and row["input_ids"].tolist() == wanted["input_ids"]
        assert (row["labels"] is None) == (wanted["labels"] is None)


# -- odd rows -------------------------------------------------------------------------------------


def reasons(rows: list[Any]) -> list[str | None]:
    return [row.reason if isinstance(row, RowError) else None for row in rows]


def test_rows_that_cannot_be_read_are_rejected_by_reason(tmp_path: Path) -> None:
    cases: list[tuple[FileFormat, bytes, list[str | None]]] = [
        (
            "jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n{"te\n\n',
            [None, "invalid UTF-8", "invalid JSON", BLANK_LINE],
        ),
        ("text", b"a\n\xff\n\n b\r\n", [None, "invalid UTF-8", BLANK_LINE, None]),
        (
            "csv",
            b'a,b\n1,2\n1\n1,2,3\n\n"x"y,2\n1,\xff\n"\n",2\n',
            [None, *["wrong number of fields"] * 2, BLANK_LINE, "invalid CSV", "invalid UTF-8", None],
        ),
    ]
    for form, content, wanted in cases:
        path = tmp_path / f"rows.{form}"
        path.write_bytes(content)
        index = scan(str(path), "rows", form)
        rows = read_span(str(path), form, index.span(0, 0, index.num_rows), [])
        assert reasons(rows) == wanted, form
        last = read_span(str(path), form, index.span(0, index.num_rows - 1, 1), [])
        assert reasons(last) == wanted[-1:]
    assert rows[1].detail == "1, and the header has 2"
    assert read_span(
        str(tmp_path / "rows.text"), "text", scan(str(tmp_path / "rows.text"), "", "text").span(0, 3, 1), []
    ) == [{"text": " b"}]


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="its header names the column 'a' twice"):
        scan(str(path), "x", "csv")


def test_damaged_tables_name_the_file_and_the_part(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} " + "x" * 50} for i in range(150)]
    good = as_parquet(rows)
    path = tmp_path / "x.parquet"
    path.write_bytes(good)
    index = scan(str(path), "x", "parquet")
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    path.write_bytes(good[:start] + bytes(len(good[start : start + 200])) + good[start + 200 :])
    assert read_span(str(path), "parquet", index.span(0, 0, 37), ["text"]) == rows[:37]
    with pytest.raises(DataError, match=r"x.parquet: row group 2 cannot be read"):
        read_span(str(path), "parquet", index.span(0, 80, 3), ["text"])
    path.write_bytes(good[:-30])
    with pytest.raises(DataError, match="x.parquet is no valid Parquet file"):
        scan(str(path), "x", "parquet")
    for stream in (True, False):
        arrow = tmp_path / "x.arrow"
        arrow.write_bytes(as_arrow(rows, stream)[: 4000 if stream else 3000])
        with pytest.raises(DataError, match="x.arrow is no valid Arrow file"):
            scan(str(arrow), "x", "arrow")


# -- through a configuration ----------------------------------------------------------------------


def test_a_csv_of_texts_is_prepared(base: Path, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f'the "quick" fox, {i}\nand more'} for i in range(40)]
    (tmp_path / "rows.csv").write_bytes(as_csv(rows))
    data = section(tmp_path / "rows.csv", dataset={"type": "completion"})
    made = plan(data, base, tmp_path)
    assert made.sources[0].files[0].format == "csv"
    assert sum(stats.documents for stats in prepare_all(made, data, base)) == 40
    assert all_rows(data, base, tmp_path) == rows


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", None)])
def test_compressed_files_are_unpacked_once_and_say_so(
    base: Path, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes] | None
) -> None:
    rows = chats(90)
    pack = pack or (lambda content: pa.compress(content, codec="zstd", asbytes=True))
    # Two members after each other, as `cat a.gz b.gz` makes them.
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(pack(as_lines(rows[:40])) + pack(as_lines(rows[40:])))
    data = section(tmp_path / f"rows.jsonl{suffix}")
    made = plan(data, base, tmp_path)
    unpacked = list((tmp_path / "prepared" / "unpacked").iterdir())
    assert [path.read_bytes() for path in unpacked] == [as_lines(rows)]
    assert any(
        "1 compressed file cannot be read in parts, so the content was unpacked" in n for n in made.notices
    )
    assert all_rows(data, base, tmp_path) == rows
    assert [path.stat().st_mtime_ns for path in unpacked] == [
        path.stat().st_mtime_ns for path in (tmp_path / "prepared" / "unpacked").iterdir()
    ]
    plain = section(write_lines(tmp_path / "rows.jsonl", rows))
    assert [w.key for w in plan(plain, base, tmp_path).windows] == [w.key for w in made.windows]


def test_the_same_bytes_in_another_format_are_other_windows(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "the fox"}] * 20)
    as_json, as_text = (
        plan(section(path, dataset={"type": "completion", "ds_type": form}), base, tmp_path)
        for form in ("json", "text")
    )
    assert as_json.windows[0].spans == as_text.windows[0].spans
    assert as_json.windows[0].key != as_text.windows[0].key


def test_a_truncated_compressed_file_is_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(chats(200)))[:-500])
    with pytest.raises(DataError, match=r"rows.jsonl.gz is damaged .*; compress it again"):
        plan(section(path), base, tmp_path)
    assert not list((tmp_path / "prepared" / "unpacked").iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [{"role": "user", "content": "broken', "invalid JSON"),
        (b"[1,2]", "the row is no object"),
        (b'[{"role": "user", "conte', "invalid JSON"),
        (b'{"messages": "\xff"}', "invalid UTF-8"),
    ],
)
def test_a_bad_first_line_is_rejected_alone(
    base: Path, tmp_path: Path, name: str, line: bytes, reason: str
) -> None:
    content = line + b"\n" + as_lines(chats(40, words=3))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = section(tmp_path / name)
    (stats,) = prepare_all(plan(data, base, tmp_path), data, base)
    assert (stats.rows, stats.documents, stats.rejected) == (41, 40, {reason: 1})
    assert [row for row, _, _ in stats.rejected_rows] == [0]


def test_an_array_in_a_jsonl_file_is_its_rows(base: Path, tmp_path: Path) -> None:
    rows = chats(40)
    path = tmp_path / "rows.jsonl"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, indent=indent) + "\n")
        assert all_rows(section(path), base, tmp_path) == rows


def test_what_datasets_saves_is_read_in_its_order(base: Path, tmp_path: Path) -> None:
    import datasets

    train, test = chats(120), chats(30, seed=1)
    splits = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
    splits["train"].save_to_disk(str(tmp_path / "alone"), num_shards=12)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    assert all_rows(section(tmp_path / "alone"), base, tmp_path) == train
    assert all_rows(section(tmp_path / "both"), base, tmp_path) == train
    assert all_rows(section(tmp_path / "both", dataset={"split": "test[:10]"}), base, tmp_path) == test[:10]
    held = plan(section(tmp_path / "alone", test_datasets=[{"path": str(tmp_path / "both")}]), base, tmp_path)
    assert held.sources[1].num_rows == 30
    with pytest.raises(ConfigError, match=r"datasets\[0\].split: .* has no split 'dev'; it has train, test"):
        plan(section(tmp_path / "both", dataset={"split": "dev"}), base, tmp_path)


def test_patterns_and_mixed_formats(base: Path, tmp_path: Path) -> None:
    rows = chats(30)
    write_lines(tmp_path / "set" / "a" / "1.jsonl", rows[:10])
    (tmp_path / "set" / "a" / "2.parquet").write_bytes(as_parquet(rows[10:20]))
    write_lines(tmp_path / "set" / "b" / "3.jsonl", rows[20:])
    (tmp_path / "set" / "README.txt").write_text("what this is")
    (tmp_path / "set" / "info.json").write_text("{}")
    for pattern, wanted in (
        ("set", rows),
        ("set/*/*.jsonl", rows[:10] + rows[20:]),
        ("set/**/[12].*", rows[:20]),
    ):
        assert all_rows(section(tmp_path / pattern), base, tmp_path) == wanted, pattern


def test_empty_files_beside_others_are_no_matter(base: Path, tmp_path: Path) -> None:
    rows = chats(10)
    write_lines(tmp_path / "set" / "b.jsonl", rows)
    for name, content in (
        ("a.jsonl", b""),
        ("c.parquet", as_parquet(rows[:1])),
        ("d.jsonl.gz", gzip.compress(b"")),
    ):
        (tmp_path / "set" / name).write_bytes(content)
    empty = pa.Table.from_pylist(rows).slice(0, 0)
    pq.write_table(empty, tmp_path / "set" / "0.parquet")
    assert all_rows(section(tmp_path / "set"), base, tmp_path) == rows + rows[:1]
    (tmp_path / "array.json").write_text("[]")
    with pytest.raises(DataError, match="holds no rows"):
        plan(section(tmp_path / "array.json"), base, tmp_path)


def test_shards_are_runs_of_consecutive_rows_that_share_all(base: Path, tmp_path: Path) -> None:
    rows = chats(103)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    parts = [
        all_rows(section(path, dataset={"split": "train[3:]", "shards": 3, "shards_idx": i}), base, tmp_path)
        for i in range(3)
    ]
    assert [row for part in parts for row in part] == rows[3:]
    assert [len(part) for part in parts] == [34, 33, 33]
    with pytest.raises(DataError, match="holds no rows for part 103 of 104 shards"):
        plan(section(path, dataset={"shards": 104, "shards_idx": 103}), base, tmp_path)


def test_a_weight_is_part_of_the_plan_and_not_of_the_shards(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(50))
    plain, double = (plan(section(path, dataset={"weight": w}), base, tmp_path) for w in (None, 2.5))
    assert (plain.sources[0].weight, double.sources[0].weight) == (None, 2.5)
    assert plain.windows == double.windows
    assert DataPlan.from_json(json.loads(json.dumps(double.to_json()))) == double


@pytest.mark.parametrize(
    ("name", "content", "dataset", "message"),
    [
        ("x.jsonl", as_lines([{"mesages": []}] * 3), {}, "the first row has mesages; did you mean 'mesages'"),
        ("x.parquet", as_parquet([{"mesages": "x"}]), {}, "it has mesages; did you mean 'mesages'"),
        ("x.csv", b"txt,b\n1,2\n", {"type": "completion"}, "has txt, b; did you mean 'txt'"),
        ("x.csv", b"", {"type": "completion"}, "holds no rows"),
        ("x.txt", b"", {"type": "completion"}, "holds no rows"),
        ("x.txt", b"\xff\xfe\n" * 3, {"type": "completion"}, "none of 3 rows .*: invalid UTF-8"),
    ],
)
def test_unusable_files_are_refused(
    base: Path, tmp_path: Path, name: str, content: bytes, dataset: Any, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=message):
        plan(section(tmp_path / name, dataset=dataset), base, tmp_path)


def test_a_column_that_one_of_the_files_lacks(base: Path, tmp_path: Path) -> None:
    """Of a file of columns it is known before anything is read; of lines each row says so itself."""
    folder = tmp_path / "lines"
    write_lines(folder / "a.jsonl", [{"text": "the fox"}] * 20)
    write_lines(folder / "b.jsonl", [{"body": "the fox"}] * 3)
    data = section(folder, dataset={"type": "completion"})
    made = plan(data, base, tmp_path)
    (stats,) = prepare_all(made, data, base)
    assert stats.documents == 20 and stats.rejected == {"no field 'text'": 3}
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.parquet").write_bytes(as_parquet([{"text": "x"}]))
    (tmp_path / "tables" / "b.parquet").write_bytes(as_parquet([{"body": "x"}]))
    with pytest.raises(
        ConfigError, match=r"datasets\[0\].field: .*b.parquet has no column 'text'; it has body"
    ):
        plan(section(tmp_path / "tables", dataset={"type": "completion"}), base, tmp_path)


# -- what has to be prepared again ----------------------------------------------------------------


def missing(before: DataPlan, after: DataPlan) -> int:
    """Windows whose shards do not exist yet."""
    known = {window.key for window in (*before.windows, *before.eval_windows)}
    return sum(window.key not in known for window in (*after.windows, *after.eval_windows))


@pytest.mark.parametrize("name", ["0", "m", "z"])
@pytest.mark.parametrize("words", [12, 60])
def test_a_file_more_leaves_the_windows_of_the_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: int
) -> None:
    """Also where its rows are of another length, in front, where the windows' size is probed."""
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    folder = tmp_path / "set"
    for number, letter in enumerate("abxy"):
        write_lines(folder / f"{letter}.jsonl", chats(400, seed=number))
    data = section(folder, val_set_size=0.1)
    before = plan(data, base, tmp_path)
    write_lines(folder / f"{name}.jsonl", chats(300, seed=9, words=words))
    after = plan(data, base, tmp_path)
    of_new_file = [
        window
        for window in (*after.windows, *after.eval_windows)
        if any(after.sources[0].files[span.file].name.endswith(f"/{name}.jsonl") for span in window.spans)
    ]
    assert len(before.windows) > 12 and len(of_new_file) > 2
    # Held-out rows of one file are fewer than a window: files share those windows.
    assert missing(before, after) <= len(of_new_file) + 1


def test_one_of_many_small_files_changes_few_windows(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    generator = random.Random(0)
    for number in range(300):
        write_lines(folder / f"{number:03}.jsonl", chats(generator.randint(5, 60), seed=number))
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(sources, "PACKS_PER_WINDOW", 16)
        before = plan(section(folder), base, tmp_path)
        for name in ("000a", "150a", "300"):
            write_lines(folder / f"{name}.jsonl", chats(20, seed=1000))
            after = plan(section(folder), base, tmp_path)
            assert 1 <= missing(before, after) <= 8 < len(after.windows) / 10, name
            before = after


def test_rows_at_the_end_of_a_file_change_its_last_windows_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    monkeypatch.setattr("nemo_ray.data.lines._BLOCK_BYTES", 1 << 12)
    path = write_lines(tmp_path / "rows.jsonl", chats(900))
    before = plan(section(path), base, tmp_path)
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in chats(64, seed=7))
    after = plan(section(path), base, tmp_path)
    assert len(before.windows) > 8
    assert 1 <= missing(before, after) <= 2
    content = path.read_bytes()
    path.write_bytes(content.replace(b"quick", b"quack", 1))
    assert missing(after, plan(section(path), base, tmp_path)) == 1


def test_scans_of_large_files_are_remembered_until_the_file_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_ray.data.remembered.HASHED_BYTES", 1 << 10)
    path = write_lines(tmp_path / "rows.jsonl", chats(300))
    before = plan(section(path), base, tmp_path)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_ray.data.remembered.scan_lines", refuse)
        again = plan(section(path), base, tmp_path)
        assert again == before
        with open(path, "a") as file:
            file.write(json.dumps(chats(1)[0]) + "\n")
        with pytest.raises(AssertionError, match="scanned again"):
            plan(section(path), base, tmp_path)
    assert plan(section(path), base, tmp_path).num_rows == 301
    for place in (tmp_path / "prepared" / "scans").iterdir():
        place.write_bytes(b"PK damaged")
    assert plan(section(path), base, tmp_path).num_rows == 301
