"""Google Cloud Storage, against a server of its protocol: sources, shards, and what the user is told."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray import storage
from nemo_ray.data.reader import PackReader
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import sum_shards
from nemo_ray.errors import StorageError
from tests.data.helpers import chats, prepare_all, section
from tests.data.test_files import as_lines, as_parquet

_START_WITHIN_S = 60.0

# Its own server answers one connection at a time, and the client keeps several. It names its port in answers.
_SERVE = """
import socket
import threading
from http import server
server.HTTPServer = server.ThreadingHTTPServer
from gcp_storage_emulator.server import create_server
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
it = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
it.start()
print(port, flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    watchdog = threading.Timer(_START_WITHIN_S, process.kill)
    watchdog.start()
    line = process.stdout.readline()
    watchdog.cancel()
    assert line, "the server did not start"
    try:
        with pytest.MonkeyPatch().context() as patch:
            patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{int(line)}")
            yield "gs://anonymous@bucket"
    finally:
        process.terminate()
        process.wait(10)


def test_rows_are_read_and_shards_written_and_read(bucket: str, base: Path) -> None:
    rows = chats(120)
    storage.publish_bytes(f"{bucket}/set/a.jsonl", as_lines(rows[:60]))
    storage.publish_bytes(f"{bucket}/set/b.parquet", as_parquet(rows[60:]))
    data = section(f"{bucket}/set")
    plan = plan_data(data, str(base), f"{bucket}/prepared")
    assert sum_shards(plan, plan.windows).windows == 0, "there is no such folder yet"
    prepare_all(plan, data, base)
    assert sum_shards(plan, plan.windows).rows == plan.num_rows == 120
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=4)
    read = [row for step in iter(reader.next_step, None) for pack in step.packs for row in pack.sample_rows]
    assert len(read) == sum_shards(plan, plan.windows).documents == len(set(read)) > 100


def test_files_and_what_is_not_there(bucket: str) -> None:
    data = bytes(range(256)) * (24 << 10)  # in parts, and read in parts
    storage.publish_bytes(f"{bucket}/large", data)
    with storage.open_input(f"{bucket}/large") as file:
        file.seek(5 << 20)
        assert file.read(300) == data[5 << 20 :][:300]
    assert storage.read_bytes(f"{bucket}/large") == data
    assert storage.list_names(f"{bucket}/none") == set() and not storage.exists(f"{bucket}/none")
    storage.remove(f"{bucket}/large")
    storage.remove(f"{bucket}/large")
    assert storage.file_facts(f"{bucket}/large") is None
    with pytest.raises(StorageError, match=r"/x: writing failed: there is no bucket nothere; create it"):
        storage.publish_bytes("gs://anonymous@nothere/x", b"1")
