"""Sources in an object store: what a URL may name, what is asked of the store, what the user is told."""

import gzip
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ray import storage
from nemo_ray.data import tables
from nemo_ray.data.prepare import read_rows, window_task
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import ConfigError, DataError
from tests.data.helpers import chats, section
from tests.data.test_files import as_arrow, as_lines, as_parquet, plan
from tests.object_store import ObjectStore

ROWS = chats(120)
FILES = {
    "set/a.jsonl": as_lines(ROWS[:40]),
    "set/b.parquet": as_parquet(ROWS[40:80]),
    "set/sub/c.jsonl.gz": gzip.compress(as_lines(ROWS[80:])),
    "set/about.txt": b"what this is",
    "arrow/file.arrow": as_arrow(ROWS, stream=False),
    "arrow/stream.arrow": as_arrow(ROWS, stream=True),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket("bucket")
        with pytest.MonkeyPatch().context() as patch:
            for name, value in store.environ().items():
                patch.setenv(name, value)
            for name, content in FILES.items():
                system, inner = storage.file_system(f"s3://bucket/{name}")
                with system.open_output_stream(inner, compression=None) as file:
                    file.write(content)
            yield store


def test_a_parquet_file_elsewhere_is_read_by_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's own would hold it for a moment longer: where the process ended then, it was aborted."""
    threads = set()

    class Watched(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            threads.add(threading.get_ident())
            return super().read(*size)

    monkeypatch.setattr(tables, "open_input", lambda path: Watched(FILES["set/b.parquet"]))
    path = "s3://bucket/set/b.parquet"
    index = tables.scan_table(path, "parquet", "identity")
    assert tables.read_table(path, "parquet", [index.span(0, 0, 40)], ["messages"]) == [
        {"messages": row["messages"]} for row in ROWS[40:80]
    ]
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize(
    ("path", "dataset", "rows"),
    [
        ("set", {}, ROWS),
        ("set/*.jsonl", {}, ROWS[:40]),
        ("set/**/*.jsonl.gz", {}, ROWS[80:]),
        ("set/a.jsonl", {"split": "train[5:10]"}, ROWS[5:10]),
        ("set", {"data_files": ["b.*"]}, ROWS[40:80]),
        ("arrow/file.arrow", {}, ROWS),
    ],
)
@pytest.mark.parametrize("prepared", ["here", "there"])
def test_what_a_url_names_is_read(
    server: Any, base: Path, tmp_path: Path, path: str, dataset: Any, rows: list[Any], prepared: str
) -> None:
    """Also where scans are remembered, and compressed files unpacked, in the store itself."""
    data = section(f"s3://bucket/{path}", dataset=dataset)
    directory = str(tmp_path) if prepared == "here" else f"s3://bucket/{tmp_path.name}"
    made = plan_data(data, str(base), directory, say=lambda text: None)
    tasks = [window_task(made, window, data, str(base), held_out=False) for window in made.windows]
    assert [row for task in tasks for row in read_rows(task)] == rows


def test_lines_are_scanned_once_until_the_object_changes(
    server: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section("s3://bucket/growing.jsonl")
    storage.publish_bytes("s3://bucket/growing.jsonl", as_lines(ROWS[:40]))
    before = plan(data, base, tmp_path)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_ray.data.remembered.scan_lines", refuse)
        assert plan(data, base, tmp_path) == before
    storage.publish_bytes("s3://bucket/growing.jsonl", as_lines(ROWS[:60]))
    assert plan(data, base, tmp_path).num_rows == 60


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", r"datasets\[0\].path: s3://bucket/none is not there, or holds no .jsonl"),
        ("set/*.csv", r"datasets\[0\].path: s3://bucket/set/\*.csv matches no file"),
        ("arrow/stream.arrow", "stream.arrow is an Arrow stream, .*; write it as Parquet, or copy it"),
    ],
)
def test_mistakes_name_the_url(server: Any, base: Path, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        plan(section(f"s3://bucket/{path}"), base, tmp_path)
