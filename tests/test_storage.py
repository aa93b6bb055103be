"""Files by URL, through the real client against an S3 store whose requests fail now and then."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray import object_store, storage, urls
from nemo_ray.errors import StorageError
from nemo_ray.failures import one_line
from tests.object_store import FAULTS, Fault, ObjectStore, use

LARGE = os.urandom(6 << 20)
"""Written in parts."""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket("bucket")
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    use(server, monkeypatch, stall_s=10.0)
    return server


def test_bytes_json_and_files_come_back_by_url(store: ObjectStore) -> None:
    storage.publish_bytes("s3://bucket/a/large", LARGE)
    storage.publish_json("s3://bucket/a/b/small.json", {"x": "ü"})
    assert store.objects("bucket")["a/large"] == LARGE == storage.read_bytes("s3://bucket/a/large")
    assert storage.read_json("s3://bucket/a/b/small.json") == {"x": "ü"}
    with storage.open_input("s3://bucket/a/large") as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == LARGE[-5:] and file.tell() == len(LARGE)
        file.seek(1000)
        assert file.read(10) == LARGE[1000:1010]
    facts = storage.file_facts("s3://bucket/a/large")
    assert facts is not None and facts.size_bytes == len(LARGE) and facts.modified_ns > 0
    assert storage.list_files("s3://bucket/a") == ["s3://bucket/a/b/small.json", "s3://bucket/a/large"]
    assert storage.list_names("s3://bucket/a") == {"large"}
    assert storage.exists("s3://bucket/a/large") and not storage.exists("s3://bucket/a")
    storage.publish_bytes("s3://bucket/a/large", b"new")
    assert storage.read_bytes("s3://bucket/a/large") == b"new"
    storage.remove("s3://bucket/a/large")
    storage.remove("s3://bucket/a/large")
    assert not storage.exists("s3://bucket/a/large") and storage.file_facts("s3://bucket/a/large") is None
    assert storage.list_files("s3://bucket/none") == [] and storage.list_names("s3://bucket/none") == set()
    with pytest.raises(FileNotFoundError):
        storage.open_input("s3://bucket/a/large")
    with pytest.raises(FileNotFoundError):
        storage.read_json("s3://bucket/none.json")


def test_a_small_object_is_one_request_and_its_lookup_is_one(store: ObjectStore) -> None:
    with store.recorded() as requests:
        storage.publish_bytes("s3://bucket/small", b"x" * 1000)
        storage.exists("s3://bucket/small")
        storage.exists("s3://bucket/absent")
    assert [request.method for request in requests] == ["PUT", "HEAD", "HEAD"]


def test_a_range_is_read_without_the_rest(store: ObjectStore) -> None:
    store.put("bucket", "wide", LARGE)
    with store.recorded() as requests, storage.open_input("s3://bucket/wide") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == LARGE[-1000:]
    assert sum(request.num_bytes for request in requests) == 1000


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "stall"])
def test_a_request_that_fails_is_made_again(store: ObjectStore, fault: Fault) -> None:
    for method in ("POST", "PUT"):
        store.fail_next(fault, method=method)
        storage.publish_bytes(f"s3://bucket/again-{method}", LARGE)
        assert store.objects("bucket")[f"again-{method}"] == LARGE
    for method in ("HEAD", "GET"):
        store.fail_next(fault, method=method)
        assert storage.read_bytes("s3://bucket/again-PUT") == LARGE
        store.fail_next(fault, method=method)
        with storage.open_input("s3://bucket/again-PUT") as file:
            file.seek(3_000_000)
            assert file.read() == LARGE[3_000_000:]
    store.fail_next(fault, method="GET")
    assert "again-PUT" in storage.list_names("s3://bucket")
    store.fail_next(fault, method="DELETE")
    storage.remove("s3://bucket/again-PUT")
    assert not storage.exists("s3://bucket/again-PUT")


def test_a_transfer_that_stands_still_is_begun_again(store: ObjectStore) -> None:
    store.put("bucket", "stall", LARGE)
    for method in ("GET", "PUT"):
        store.fail_next("stall", method=method)
        started = time.monotonic()
        assert storage.read_bytes("s3://bucket/stall") == LARGE
        storage.publish_bytes("s3://bucket/stall", b"x" * 1000 if method == "PUT" else LARGE)
        assert time.monotonic() - started < store.stall_s


def test_more_failures_than_the_client_bears(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "CLIENT_ATTEMPTS", 3)
    object_store._connect.cache_clear()
    store.put("bucket", "patience", b"x" * 100)
    store.fail_next(*(["503"] * 4))
    assert storage.read_bytes("s3://bucket/patience") == b"x" * 100


def test_a_store_that_has_answered_may_be_away_for_a_while(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_S", 60.0)
    monkeypatch.setattr(object_store, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(object_store, "_answered", set())
    store.put("bucket", "away", b"x")
    store.fail_always("reset")
    with pytest.raises(StorageError, match=f"failed {object_store.ATTEMPTS} times"):
        storage.read_bytes("s3://bucket/away")  # a wrong address is told soon
    store.fail_always(None)
    assert storage.read_bytes("s3://bucket/away") == b"x"
    store.fail_always("reset")
    back = threading.Timer(3.0, store.fail_always, [None])
    back.start()
    began = time.monotonic()
    assert storage.read_bytes("s3://bucket/away") == b"x"
    assert time.monotonic() - began > 2.5
    back.join()


def test_many_objects_over_a_store_that_fails_often(store: ObjectStore) -> None:
    store.stall_s = 1.5
    store.fail_some(0.25, seed=1)
    contents = {f"many/{number:03}": os.urandom(number * 997) for number in range(40)}
    for name, data in contents.items():
        storage.publish_bytes(f"s3://bucket/{name}", data)
    assert storage.list_files("s3://bucket/many") == [f"s3://bucket/{name}" for name in contents]
    for name, data in contents.items():
        assert storage.read_bytes(f"s3://bucket/{name}") == data
    assert sum(request.fault is not None for request in store.requests) > 10


@pytest.mark.parametrize("fault", ["500", "reset", "lost reply"])
@pytest.mark.parametrize("before", [0, 2])
def test_blocks_are_sent_again_from_the_first(store: ObjectStore, fault: Fault, before: int) -> None:
    begun = []

    def blocks() -> Iterator[memoryview]:
        begun.append(len(begun))
        view = memoryview(LARGE)
        yield from (view[: 4 << 20], view[4 << 20 :], view, view, view)

    faults: list[Fault | None] = [*[None] * before, fault]
    choose = store._choose
    store._choose = lambda method, path: faults.pop(0) if faults and method == "PUT" else None
    storage.publish_blocks("s3://bucket/blocks", blocks, 4 * len(LARGE))
    store._choose = choose
    assert begun == [0, 1]
    assert store.objects("bucket")["blocks"] == LARGE * 4


def test_blocks_wait_for_those_before_them(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large object only what is on its way is in memory."""
    monkeypatch.setattr(storage, "_IN_FLIGHT_BYTES", 8 << 20)
    part_bytes, waiting = 10 << 20, []

    def choose(method: str, path: str) -> Fault | None:
        time.sleep(0.2 if method == "PUT" else 0)
        return None

    monkeypatch.setattr(store, "_choose", choose)

    def blocks() -> Iterator[bytes]:
        before = len(store.requests)
        for number in range(12):
            sent = sum(request.method == "PUT" for request in store.requests[before:])
            waiting.append((number << 22) - sent * part_bytes)
            yield LARGE[: 4 << 20]

    storage.publish_blocks("s3://bucket/slow", blocks, 48 << 20)
    assert store.objects("bucket")["slow"] == LARGE[: 4 << 20] * 12
    assert max(waiting) <= (8 << 20) + part_bytes


# -- a folder goes --------------------------------------------------------------------------------


def test_a_folder_goes_with_what_makes_it_complete_first(store: ObjectStore) -> None:
    for name in ("step-1/a", "step-1/state.json", "step-1/z/b", "step-10/a"):
        store.put("bucket", f"steps/{name}", b"x")
    store.fail_always("500", method="POST")
    with pytest.raises(StorageError, match="^s3://bucket/steps/step-1: deleting failed"):
        storage.remove_folder("s3://bucket/steps/step-1", "state.json")
    store.fail_always(None)
    assert not storage.exists("s3://bucket/steps/step-1/state.json")
    assert storage.exists("s3://bucket/steps/step-1/a")
    store.fail_next("lost reply", method="POST")
    for _ in range(2):
        storage.remove_folder("s3://bucket/steps/step-1/", "state.json")
        assert storage.list_files("s3://bucket/steps") == ["s3://bucket/steps/step-10/a"]
    keys = store.client().list_objects_v2(Bucket="bucket", Prefix="steps/step-1/")
    assert keys["KeyCount"] == 0  # nor what stands for an empty folder


def test_a_folder_of_a_file_system_goes(tmp_path: Path) -> None:
    storage.publish_bytes(tmp_path / "step-1" / "state.json", b"x")
    for _ in range(2):
        storage.remove_folder(tmp_path / "step-1", "state.json")
        assert list(tmp_path.iterdir()) == []


# -- a write that does not end well ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("data", [LARGE, b"small"], ids=["large", "small"])
def test_a_write_that_fails_leaves_what_was_there(store: ObjectStore, method: str, data: bytes) -> None:
    store.put("bucket", "old", b"old")
    for fault in ("500", "403", "reset"):
        for name in ("old", "fresh"):
            store.fail_always(fault, method=method)
            if method == "POST" and data == b"small":
                break  # one PUT
            with pytest.raises(StorageError, match=f"^s3://bucket/{name}: writing failed"):
                storage.publish_bytes(f"s3://bucket/{name}", data)
            store.fail_always(None)
    kept = store.objects("bucket")
    assert kept["old"] == b"old" and "fresh" not in kept


def test_a_writer_that_is_killed_leaves_nothing(store: ObjectStore) -> None:
    store.stall_s = 3.0
    store.fail_always("stall", method="PUT")  # parts arrive, and no answer comes back
    code = "from nemo_ray import storage; storage.publish_bytes('s3://bucket/killed', bytes(6 << 20))"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | store.environ())
    deadline = threading.Event()
    for _ in range(300):
        if any("/killed" in request.path for request in store.requests):
            break
        deadline.wait(0.1)
    process.kill()
    process.wait(10)
    store.fail_always(None)
    assert "killed" not in store.objects("bucket")


def test_blocks_that_break_off_leave_nothing(store: ObjectStore) -> None:
    """Neither at once, nor when what was left of the upload is freed, at the latest as the process ends."""
    code = """
import gc
from nemo_ray import storage

def blocks():
    for _ in range(12):
        yield bytes(1 << 20)
    raise KeyboardInterrupt

for size in (1, 12 << 20):
    try:
        storage.publish_blocks(f"s3://bucket/broken-{size}", blocks, size)
    except KeyboardInterrupt:
        pass
gc.collect()
print("caught")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | store.environ(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "caught\n")
    assert any("/broken" in request.path for request in store.requests)
    assert not any(key.startswith("broken") for key in store.objects("bucket"))


def test_two_writers_of_one_object_leave_one_of_both(store: ObjectStore) -> None:
    contents = [bytes([number]) * (5 << 20) for number in range(2)]
    threads = [
        threading.Thread(target=storage.publish_bytes, args=("s3://bucket/both", data)) for data in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.objects("bucket")["both"] in contents


# -- error lines ----------------------------------------------------------------------------------


def line_of(url: str, write: bool = False) -> str:
    with pytest.raises(StorageError) as caught:
        storage.publish_bytes(url, b"x") if write else storage.read_bytes(url)
    line = str(caught.value)
    assert line.startswith(url) and "\n" not in line and len(line) < 400
    return line


def test_errors_name_url_cause_and_remedy(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no bucket nowhere; create it" in line_of("s3://nowhere/x", write=True)
    store.fail_always("403")
    assert "access denied; give these credentials the right to it" in line_of("s3://bucket/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no AWS_ACCESS_KEY_ID is set in this process; set AWS_ACCESS_KEY_ID and" in line_of(
        "s3://bucket/x"
    )
    assert "access denied without credentials" in line_of("s3://anonymous@bucket/x")
    store.fail_always("503", method="HEAD")
    assert "opening" not in (line := line_of("s3://anonymous@bucket/x")) and "failed 5 times" in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    line = line_of("s3://anonymous@bucket/x")
    assert "http://127.0.0.1:1 (AWS_ENDPOINT_URL) cannot be reached" in line


def test_an_error_crosses_processes_and_is_both_ours_and_the_systems() -> None:
    error = pickle.loads(pickle.dumps(StorageError("s3://b/x: reading failed: access denied")))
    assert str(error) == "s3://b/x: reading failed: access denied" == one_line(error)
    assert isinstance(error, OSError) and error.exit_code == 1


def test_a_denied_request_is_not_repeated(store: ObjectStore) -> None:
    store.fail_always("403")
    with store.recorded() as requests:
        line_of("s3://bucket/x")
    assert len(requests) == 1


def test_without_credentials_requests_are_not_signed(store: ObjectStore) -> None:
    store.put("bucket", "public", b"x")
    store.client().put_bucket_acl(Bucket="bucket", ACL="public-read")
    store.client().put_object_acl(Bucket="bucket", Key="public", ACL="public-read")
    with store.recorded() as requests:
        assert storage.read_bytes("s3://anonymous@bucket/public") == b"x"
        assert storage.list_names("s3://anonymous@bucket") >= {"public"}
    assert not any(request.signed for request in requests)
    with store.recorded() as requests:
        storage.read_bytes("s3://bucket/public")
    assert all(request.signed for request in requests)


BAD_URLS = {
    "s3://key:hidden@bucket/x": "holds credentials",
    "s3://hidden@bucket/x": "holds credentials",
    "gs://key:hidden@bucket/x": "holds credentials",
    "abfs://container:hidden@account.dfs.core.windows.net/x": "holds credentials",
    "s3://bucket/x?secret_key=hidden&region=x": "options after `?`",
    "http://bucket/x": "is not an object store's",
    "s3:///x": "names no bucket",
    "abfs://container/x": "names no storage account",
}


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_used_is_told_without_its_secrets(url: str) -> None:
    for work in (storage.open_input, storage.read_json, storage.list_files, storage.exists):
        with pytest.raises(StorageError, match=BAD_URLS[url]) as caught:
            work(url)
        assert "hidden" not in str(caught.value)
    assert "hidden" not in urls.redact(f"datasets.0.path: '{url}' is wrong")


def test_urls_of_the_three_stores_have_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    parts = {
        "s3://b/k/x": ("s3", "b", "k/x", None, False),
        "gs://anonymous@b/k": ("gs", "b", "k", None, True),
        "gcs://b": ("gs", "b", "", None, False),
        "abfs://c@other.dfs.core.windows.net/k": ("abfs", "c", "k", "other", False),
        "az://c/k": ("abfs", "c", "k", "mine", False),
    }
    for url, expected in parts.items():
        assert urls.parse(url) == expected
        assert storage.file_system(url)[0].type_name.startswith(expected[0][:2].replace("gs", "gc"))
    environ = {"AWS_REGION": "x", "AWS_SECRET_ACCESS_KEY": "y", "GOOGLE_APPLICATION_CREDENTIALS": "z"}
    assert urls.variables_to_pass_on(["s3://b/x"], environ).keys() == {
        "AWS_REGION",
        "AWS_SECRET_ACCESS_KEY",
    }
    assert urls.variables_to_pass_on([], environ) == {}


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    names = [".x.arrow.0123456789ab.partial", ".y.arrow.0123456789ac.partial", "z.partial", ".x.arrow"]
    for name in names:
        (tmp_path / name).touch()
    for name in names[:1] + names[2:]:
        os.utime(tmp_path / name, (0, 0))
    storage.remove_partials(str(tmp_path), older_than_s=60)
    assert storage.list_names(str(tmp_path)) == set(names[1:])
    storage.remove_partials(str(tmp_path / "none"), older_than_s=60)
    storage.publish_bytes(tmp_path / "new", b"x")  # its name for the time of writing is one of those
    assert storage._PARTIAL.fullmatch(storage._aside(tmp_path / "new").name)


def test_paths_stay_paths(tmp_path: Path) -> None:
    folder = str(tmp_path / "x")
    assert storage.join(folder, "a", "b") == os.path.join(folder, "a", "b")
    assert storage.join("s3://b/x/", "a") == "s3://b/x/a"
    storage.publish_json(storage.join(folder, "a.json"), [1])
    assert storage.exists(storage.join(folder, "a.json")) and storage.list_names(folder) == {"a.json"}
    assert json.loads(storage.read_bytes(storage.join(folder, "a.json"))) == [1]
    storage.remove(storage.join(folder, "a.json"))
    assert storage.list_names(folder) == set() == storage.list_names(storage.join(folder, "none"))


def test_patience_is_for_stores_only() -> None:
    """The files of the hub's datasets have references that look like URLs."""
    before = set(object_store._answered)
    object_store.expect_answers(f"hub://datasets/owner/chats@{'0' * 40}/data/train.parquet")
    object_store.expect_answers("/data/train.parquet")
    assert object_store._answered == before
