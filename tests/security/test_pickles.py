"""Pickles of others are never loaded: they are left alone where they lie beside what is read, and refused
where they lie in its place."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemo_ray.config.schema import AdapterSection
from nemo_ray.data import remembered
from nemo_ray.data.remembered import remembered_scan
from nemo_ray.data.shards import DamagedShardError, Shard, read_stats
from nemo_ray.errors import NemoRayError
from nemo_ray.export.check import Setting, check_adapter
from nemo_ray.model.adapter_reader import read_adapter
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.run_dir import RunDir
from nemo_ray.train import outputs
from nemo_ray.train.checkpoint import load_checkpoint, load_weights
from nemo_ray.train.checkpoint_files import damage
from tests.data.helpers import write_lines
from tests.export.world import ADAPTERS, adapter_on, save_base
from tests.group import group_of_one
from tests.model.shapes import CPU
from tests.security import bait, is_one_line, pickled, write_pickle
from tests.train.saved import all_tensors, assert_equal, one_process, save
from tests.train.test_launch import data_plan

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a pickle was loaded"
    yield path
    assert not path.exists()


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(NemoRayError) as raised:
        call()
    assert is_one_line(str(raised.value))
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".bin", ".distcp"])
def test_the_pickles_here_would_leave_their_mark(tmp_path: Path, suffix: str) -> None:
    file, mark = tmp_path / f"file{suffix}", tmp_path / "mark"
    write_pickle(file, mark)
    if zipfile.is_zipfile(file):
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert mark.is_dir()


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    with group_of_one():
        yield


@pytest.fixture
def checkpoint(tmp_path: Path, group: None) -> Path:
    run = RunDir(tmp_path / "run")
    run.begin_attempt()
    save(run, one_process(), step=3)
    return run.checkpoint_dir(3)


def test_pickles_beside_a_checkpoint_are_left_alone(checkpoint: Path, mark: Path) -> None:
    """Among them what torch.distributed.checkpoint, transformers and accelerate would open."""
    for name in (".metadata", "__0_0.distcp", "optimizer.bin", "rank-0.pt", "training_args.bin", "a.pkl"):
        write_pickle(checkpoint / name, mark)
    again = one_process(number=1)
    assert damage(checkpoint, 0, 1) is None
    assert load_checkpoint(checkpoint, *again).step == 3
    load_weights(checkpoint, again[0])
    assert_equal(all_tensors(*again), all_tensors(*one_process()))


@pytest.mark.parametrize("name", ["state.json", "tensors.json", "rank-0.safetensors"])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_refused(
    checkpoint: Path, mark: Path, name: str
) -> None:
    assert name in {path.name for path in checkpoint.iterdir()}, "a file that is there"
    write_pickle(checkpoint / name, mark)
    assert is_one_line(str(damage(checkpoint, 0, 1)))
    again = one_process(number=1)
    assert name in refusal(lambda: load_checkpoint(checkpoint, *again))
    assert name in refusal(lambda: load_weights(checkpoint, again[0]))


@pytest.mark.parametrize("file", ["weights.pt", ".metadata"])
def test_a_checkpoint_that_names_a_pickle_is_refused(checkpoint: Path, mark: Path, file: str) -> None:
    write_pickle(checkpoint / file, mark)
    index = checkpoint / "tensors.json"
    index.write_text(index.read_text().replace("rank-0.safetensors", file))
    assert file in refusal(lambda: load_checkpoint(checkpoint, *one_process(number=1)))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "files": {file: {"bytes": 1, "xxh3": ""}}}))
    assert file in refusal(lambda: load_checkpoint(checkpoint, *one_process(number=1)))


# -- adapters and base models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "own base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_on(base, tmp_path / "adapter", **ADAPTERS["attention and mamba"])


def filled(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a base, read as a worker reads them."""
    model, _ = build(read_model_config(str(folder)), AdapterSection(), Precision(), CPU)
    fill(model, str(folder), seed=0, device=CPU, adapter_seed=0)
    return dict(model.named_parameters())


ADAPTER_PICKLES = ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt")


def test_pickles_beside_an_adapter_are_left_alone(adapter: Path, base: Path, mark: Path) -> None:
    """By our reader, and by PEFT where the check loads it."""
    wanted = load_file(adapter / "adapter_model.safetensors")
    for name in ADAPTER_PICKLES:
        write_pickle(adapter / name, mark)
    files = read_adapter(adapter)
    assert 2 * len(files.linear) == len(wanted) and all(f.A.numel() for f in files.linear.values())
    said: list[str] = []
    check_adapter(str(base), files, Setting(CPU, torch.float32), said.append)
    assert any("checked the adapter in PEFT" in line for line in said)


def test_an_adapter_of_pickles_is_refused(adapter: Path, mark: Path) -> None:
    tensors = adapter / "adapter_model.safetensors"
    write_pickle(tensors, mark)
    assert "adapter_model.safetensors cannot be read" in refusal(lambda: read_adapter(adapter))
    tensors.unlink()
    for name in ADAPTER_PICKLES:
        write_pickle(adapter / name, mark)
    assert "other formats than safetensors are not read" in refusal(lambda: read_adapter(adapter))
    write_pickle(adapter / "adapter_config.json", mark)
    assert "adapter_config.json is not JSON" in refusal(lambda: read_adapter(adapter))


BASE_PICKLES = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth")


def test_pickles_beside_a_base_are_left_alone(own_base: Path, base: Path, mark: Path) -> None:
    for name in BASE_PICKLES:
        write_pickle(own_base / name, mark)
    index = {"weight_map": dict.fromkeys(filled(base), "pytorch_model.bin")}
    (own_base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(filled(own_base), filled(base))


def test_a_base_of_pickles_is_refused(own_base: Path, mark: Path) -> None:
    index = own_base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(set(weight_map.values()))[0]
    write_pickle(own_base / first, mark)
    assert f"{first} cannot be read" in refusal(lambda: filled(own_base))
    write_pickle(own_base / "pytorch_model.bin", mark)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "pytorch_model.bin")}))
    assert "pytorch_model.bin" in refusal(lambda: filled(own_base))
    write_pickle(index, mark)
    assert "is no index of weights" in refusal(lambda: filled(own_base))
    for path in [index, *own_base.glob("*.safetensors")]:
        path.unlink()
    assert "other formats are not read" in refusal(lambda: filled(own_base))
    write_pickle(own_base / "config.json", mark)
    assert "config.json is not JSON" in refusal(lambda: read_model_config(str(own_base)))


# -- prepared data --------------------------------------------------------------------------------


def test_a_pickle_in_the_place_of_a_shard_is_refused(tmp_path: Path, mark: Path) -> None:
    shard = tmp_path / "window.arrow"
    # Once as it is, and once with the end of a shard behind it.
    for data in (pickled(mark), pickled(mark) + bytes(48) + b"NEMOSHRD"):
        shard.write_bytes(data)
        for read in (Shard, read_stats):
            with pytest.raises(DamagedShardError) as raised:
                read(str(shard))
            assert is_one_line(str(raised.value))


def test_a_remembered_scan_with_a_pickle_in_it_is_made_anew(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's own files can hold pickled objects."""
    monkeypatch.setattr(remembered, "HASHED_BYTES", 0)
    rows, directory = write_lines(tmp_path / "rows.jsonl", [{"text": "a"}] * 40), tmp_path / "prepared"

    def scanned() -> Any:
        return remembered_scan(str(rows), "jsonl", None, str(directory))

    wanted = scanned()
    (place,) = (directory / "scans").iterdir()
    with np.load(place) as arrays:
        kept = dict(arrays)
    for name in kept:
        # A file of this name was read just now: the scan that is remembered is the one that is opened.
        np.savez(place, **{**kept, name: np.array([bait(mark)], dtype=object)})
        again = scanned()
        assert again.num_rows == wanted.num_rows == 40 and again.identity == wanted.identity
    assert not mark.exists()
    np.savez(place, **{**kept, "num_rows": np.array([bait(mark)], dtype=object)})
    with np.load(place, allow_pickle=True) as arrays:
        arrays["num_rows"]
    assert mark.is_dir(), "the control: who allows pickles runs it"
    mark.rmdir()


def test_a_pickle_in_the_place_of_a_runs_plan_is_not_obeyed(tmp_path: Path, mark: Path) -> None:
    """A continued run reads the plan that it began with."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_pickle(run.data_plan_file, mark)
    with pytest.raises((NemoRayError, ValueError)):
        outputs.check_plan(run, data_plan())
