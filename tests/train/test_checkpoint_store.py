"""Checkpoints in an object store: exact, whole or not at all, and read by the ranges that are needed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nemo_ray import object_store
from nemo_ray.errors import CheckpointError, StorageError
from nemo_ray.storage import join, publish_json, read_json
from nemo_ray.train import checkpoint_files
from nemo_ray.train.checkpoint_files import STATE_NAME, Reader, Writer, damage
from tests.group import group_of_one, run_in_group
from tests.object_store import ObjectStore, Request, use

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket("bucket")
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    use(server, monkeypatch)
    monkeypatch.setattr(object_store, "LONGEST_PAUSE_S", 0.05)
    return server


@pytest.fixture
def group() -> Iterator[None]:
    with group_of_one():
        yield


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own."""
    return "s3://bucket/" + re.sub(r"\W", "-", request.node.name) + "/step-3"


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Every kind of tensor; together more than one part of an upload, and one with an odd number of bytes."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(1500, 2048, generator=generator)
    large[7] = torch.nan
    return {
        "bytes": torch.randint(256, (13,), dtype=torch.uint8, generator=generator),
        "large": large,
        "half": large[:5, :3].to(torch.bfloat16),
        "double": large[:2, :3].double(),
        "scalar": large[3, 4].clone(),
        "step": torch.tensor([seed]),
    }


def save(folder: str, tensors: dict[str, torch.Tensor], token: str = "1-a", publish: bool = True) -> None:
    def write_state(content: dict[str, Any]) -> None:
        if publish:
            publish_json(join(folder, STATE_NAME), content)

    writer = Writer(folder, dist.get_rank(), {"step": 3}, lambda: None, write_state, token)
    dcp.async_save(tensors, storage_writer=writer).result(LIMIT_S)


def load(folder: str, into: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dcp.load(into, storage_reader=Reader(folder))
    return into


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found[name], value)]
        assert found[name].dtype == value.dtype and torch.equal(*bits), name


def names(store: ObjectStore, folder: str) -> set[str]:
    start = folder.removeprefix("s3://bucket/") + "/"
    return {key.removeprefix(start) for key in store.objects("bucket") if key.startswith(start)}


def bytes_read(requests: list[Request], path: str) -> list[int]:
    """By each request for an object whose path has `path` in it; one that broke off brought nothing."""
    gets = [request.num_bytes for request in requests if request.method == "GET" and path in request.path]
    return [num_bytes for num_bytes in gets if num_bytes]


# -- exact ----------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_to_the_bit(store: ObjectStore, group: None, url: str) -> None:
    save(url, drawn(1))
    assert names(store, url) == {"rank-0.1-a.safetensors", "tensors.1-a.json", STATE_NAME}
    assert read_json(join(url, STATE_NAME))["step"] == 3
    assert_same_bits(load(url, drawn(2)), drawn(1))
    assert_same_bits(load(url, drawn(1)), drawn(1))
    assert damage(url, 0, 1) is None


def test_the_same_files_lie_in_a_folder_and_in_a_store(
    store: ObjectStore, group: None, url: str, tmp_path: Path
) -> None:
    save(url, drawn(1), token="")
    save(str(tmp_path / "step-3"), drawn(1), token="")
    found = {path.name: path.read_bytes() for path in (tmp_path / "step-3").iterdir()}
    assert found.keys() == {"rank-0.safetensors", "tensors.json", STATE_NAME}
    start = url.removeprefix("s3://bucket/")
    objects = store.objects("bucket")
    assert found == {name: objects[f"{start}/{name}"] for name in names(store, url)}


def _shard_and_read(rank: int, by_one: str, by_two: str) -> None:
    """Read what one worker wrote, write it in shards, and read those in the other shards."""
    mesh = init_device_mesh("cpu", (2,))
    wanted = drawn(1)["large"]

    def laid_out(tensor: torch.Tensor) -> dict[str, Any]:
        return {f"dim {dim}": distribute_tensor(tensor, mesh, [Shard(dim)]) for dim in range(2)}

    for dim in range(2):
        found = load(by_one, {"large": distribute_tensor(torch.zeros_like(wanted), mesh, [Shard(dim)])})
        assert_same_bits(_whole(found), {"large": wanted})
    save(by_two, laid_out(wanted))
    zeros = laid_out(torch.zeros_like(wanted))
    crossed = load(by_two, {"dim 0": zeros["dim 1"], "dim 1": zeros["dim 0"]})
    assert_same_bits(_whole(crossed), {"dim 0": wanted, "dim 1": wanted})


def _whole(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in found.items() if isinstance(value, DTensor)}


def test_shards_are_read_whole_and_by_other_layouts(store: ObjectStore, url: str, tmp_path: Path) -> None:
    by_two = f"{url}-by-two"
    wanted = drawn(1)["large"]
    with group_of_one():
        save(url, {"large": wanted})
    with store.recorded() as requests:
        run_in_group(_shard_and_read, 2, tmp_path, url, by_two, limit_s=120)
    # Half of the rows by each, and all rows by each for half of the columns.
    assert 3 * wanted.nbytes < sum(bytes_read(requests, f"{url[12:]}/rank-0")) < 3 * wanted.nbytes + 4000
    assert {name.split(".")[0] for name in names(store, by_two)} == {"rank-0", "rank-1", "tensors", "state"}
    assert [damage(by_two, part, 2) for part in range(2)] == [None, None]
    with group_of_one():
        found = load(by_two, {f"dim {dim}": torch.zeros_like(wanted) for dim in range(2)})
    assert_same_bits(found, {"dim 0": wanted, "dim 1": wanted})


# -- ranges ---------------------------------------------------------------------------------------


def test_only_what_is_needed_is_read(store: ObjectStore, group: None, url: str) -> None:
    ends = {"a": torch.arange(10.0), "c": torch.arange(20.0)}
    save(url, {"a": ends["a"], "b": torch.zeros(1 << 20), "c": ends["c"]})
    with store.recorded() as requests:
        assert_same_bits(load(url, {name: torch.zeros_like(end) for name, end in ends.items()}), ends)
    length, header, *parts = bytes_read(requests, "/rank-0")
    assert (length, parts) == (8, [40, 80]) and header < 1000


def test_what_lies_together_is_read_together(
    store: ObjectStore, group: None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_AT_ONCE_BYTES", 4000)
    wanted = {f"{number:02}": torch.full((100,), float(number)) for number in range(50)}
    wanted["05"] = torch.arange(2500.0)  # more than at once
    save(url, wanted)
    with store.recorded() as requests:
        found = load(url, {name: torch.zeros_like(value) for name, value in wanted.items()})
    assert_same_bits(found, wanted)
    read = bytes_read(requests, "/rank-0")
    assert max(read) <= 4000
    assert len(read) <= 1 + 2 + 3 + 1 + 5  # length, header, the large one, five and 44 in tens


# -- a store that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_store_that_fails_often_holds_an_equal_checkpoint(
    store: ObjectStore, group: None, url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_S", LIMIT_S)
    with store.recorded() as requests:
        store.fail_some(0.25, seed)
        save(url, drawn(seed))
        assert_same_bits(load(url, drawn(9)), drawn(seed))
        store.fail_always(None)
    assert sum(request.fault is not None for request in requests) >= 3
    assert damage(url, 0, 1) is None


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_an_upload_that_fails_leaves_nothing(store: ObjectStore, group: None, url: str, method: str) -> None:
    store.fail_always("500", method=method)
    with pytest.raises(dcp.api.CheckpointException, match="writing failed 5 times"):
        save(url, drawn(1))
    store.fail_always(None)
    assert names(store, url) == set()


def test_what_the_store_does_not_give_back_is_not_published(
    store: ObjectStore, group: None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = checkpoint_files.publish_blocks

    def lose_the_end(path: str, blocks: Any, size_bytes: int) -> None:
        put(path, lambda: [bytes(block)[:-1] for block in blocks()], size_bytes)

    monkeypatch.setattr(checkpoint_files, "publish_blocks", lose_the_end)
    with pytest.raises(
        dcp.api.CheckpointException, match="rank-0.1-a.safetensors: the store gives back other"
    ):
        save(url, drawn(1))
    assert STATE_NAME not in names(store, url)


# -- damage ---------------------------------------------------------------------------------------

FILES = ["rank-0.1-a.safetensors", "tensors.1-a.json"]


def harm(store: ObjectStore, key: str, kind: str) -> None:
    data = bytearray(store.objects("bucket")[key])
    if kind == "missing":
        store.client().delete_object(Bucket="bucket", Key=key)
        return
    data[-1] ^= 1
    store.put("bucket", key, bytes(data[:-1] if kind == "truncated" else data))


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed"])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found(store: ObjectStore, group: None, url: str, name: str, kind: str) -> None:
    save(url, {"x": torch.arange(1000.0)})
    assert [damage(url, part, 3) for part in range(3)] == [None, None, None]
    harm(store, f"{url[12:]}/{name}", kind)
    line = str(damage(url, 0, 1))
    assert name in line and "\n" not in line and ("is missing" in line) == (kind == "missing")
    assert sum(damage(url, part, 3) is not None for part in range(3)) == 1


def test_a_checkpoint_without_its_state_is_damaged(store: ObjectStore, group: None, url: str) -> None:
    save(url, {"x": torch.arange(3.0)})
    harm(store, f"{url[12:]}/{STATE_NAME}", "missing")
    assert damage(url, 0, 1) == "state.json is missing"


@pytest.mark.parametrize("fault", ["500", "403"])
def test_a_store_that_does_not_answer_is_no_damage(
    store: ObjectStore, group: None, url: str, fault: Any
) -> None:
    save(url, {"x": torch.arange(3.0)})
    for method in ("GET", "HEAD"):
        store.fail_always(fault, method=method)
        with pytest.raises(StorageError, match="failed"):
            damage(url, 0, 1)


@pytest.mark.parametrize("kind", ["missing", "truncated"])
@pytest.mark.parametrize("name", [*FILES, STATE_NAME])
def test_errors_of_reading_name_the_file(
    store: ObjectStore, group: None, url: str, name: str, kind: str
) -> None:
    save(url, {"x": torch.arange(1000.0)})
    harm(store, f"{url[12:]}/{name}", kind)
    if kind == "truncated" and name != FILES[0]:
        store.put("bucket", f"{url[12:]}/{name}", b"{")
    line = re.escape(f"{url}/{name} cannot be read: ")
    if name == FILES[0]:
        with pytest.raises(dcp.api.CheckpointException, match=f"CheckpointError.*{line}"):
            load(url, {"x": torch.zeros(1000)})
    else:
        with pytest.raises(CheckpointError, match=line):
            Reader(url).read_metadata()


# -- starts of the workers ------------------------------------------------------------------------


def test_files_of_an_older_start_come_late(store: ObjectStore, group: None, url: str) -> None:
    save(url, drawn(2), token="2-b")
    save(url, drawn(1), token="1-a", publish=False)
    assert len(names(store, url)) == 5
    assert damage(url, 0, 1) is None
    assert_same_bits(load(url, drawn(3)), drawn(2))


def test_a_newer_start_writes_over_an_older_ones(store: ObjectStore, group: None, url: str) -> None:
    save(url, drawn(1), token="1-a")
    save(url, drawn(2), token="2-b", publish=False)
    assert_same_bits(load(url, drawn(3)), drawn(1))  # until state.json is the newer one's
    save(url, drawn(2), token="2-b")
    assert_same_bits(load(url, drawn(3)), drawn(2))
