"""Files that name other files name none outside of their own folder: no model, checkpoint, dataset or plan
makes a run read what its author could not send."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from safetensors.torch import load_file

from nemo_ray.config.schema import AdapterSection
from nemo_ray.data import card
from nemo_ray.data.prepare import read_rows, window_task
from nemo_ray.data.sources import plan_data
from nemo_ray.data.window_list import Window, WindowList
from nemo_ray.errors import CheckpointError, ConfigError, NemoRayError
from nemo_ray.export.__main__ import main as export
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import publish_json
from nemo_ray.train import outputs
from nemo_ray.train.checkpoint import load_checkpoint, load_weights
from nemo_ray.train.checkpoint_files import damage
from tests.data.helpers import section, write_lines, write_tokenizer
from tests.data.test_hub_datasets import command
from tests.export.world import ADAPTERS, adapter_on, save_base
from tests.group import group_of_one
from tests.hub_server import HubServer
from tests.model.shapes import CPU
from tests.security import is_one_line
from tests.test_hub import WEIGHTS, end, small_files, start
from tests.train.saved import one_process, save
from tests.train.test_launch import data_plan

pytestmark = pytest.mark.timeout(60)
OUTSIDE = ["above", "absolute"]


def leads_to(target: Path, folder: Path, how: str) -> str:
    """How a file in `folder` would name one outside of it."""
    return os.path.relpath(target, folder) if how == "above" else str(target)


# -- base models ----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def read(folder: Path) -> None:
    model, _ = build(read_model_config(str(folder)), AdapterSection(), Precision(), CPU)
    fill(model, str(folder), seed=0, device=CPU, adapter_seed=0)


def move_out(folder: Path, how: str) -> Path:
    """Puts a file of a base beside its folder, and lets its index name it there."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = sorted(set(index["weight_map"].values()))[0]
    secret = Path(shutil.move(folder / name, folder.parent / "secret.safetensors"))
    there = leads_to(secret, folder, how)
    index["weight_map"] = {key: there if file == name else file for key, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    return secret


@pytest.mark.parametrize("how", OUTSIDE)
def test_an_index_names_no_file_outside_of_its_base(base: Path, how: str) -> None:
    """What it names would fit: only its place is wrong."""
    read(base)
    secret = move_out(base, how)
    assert load_file(secret)
    with pytest.raises(CheckpointError, match="secret.safetensors") as raised:
        read(base)
    assert is_one_line(str(raised.value))


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_merge_takes_no_file_from_outside_of_its_base(
    base: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its result is what one publishes."""
    adapter = adapter_on(base, tmp_path / "adapter", **ADAPTERS["attention and mamba"])
    move_out(base, how)
    out = tmp_path / "out"
    arguments = [str(adapter), "--merge", "--output", str(out), "--base-model", str(base)]
    assert export(arguments) == 1 and is_one_line(capsys.readouterr().err)
    assert not out.exists()


def test_an_index_of_the_hub_names_weights_of_its_repository_only(tmp_path: Path) -> None:
    """Neither a file that is here, nor code or a pickle beside the weights."""
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"weights of another model")
    fetch = (
        "import sys; from nemo_ray.errors import NemoRayError, tell; from nemo_ray.hub import local_folder\n"
        "try: print(local_folder(sys.argv[1], weights=True))\n"
        "except NemoRayError as error: sys.exit(tell(error))"
    )
    beside = {"modeling.py": b"import os", "pytorch_model.bin": b"pickle"}
    up = "../" * 5  # out of HOME/hub/models--tester--tiny/snapshots/COMMIT
    for file in (f"{up}secret.safetensors", str(secret), *beside):
        with HubServer() as hub:
            index = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": file}}).encode()}
            hub.add("tester/tiny", small_files() | WEIGHTS | beside | index)
            home = tmp_path / "home"
            out, err = end(start(hub, home, "-c", fetch, "tester/tiny@main"))
            assert not out and is_one_line(err) and file in err, f"{file}: {out}{err}"
            assert not hub.transfers(file)
            shutil.rmtree(home)


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two, of different weights."""
    with group_of_one():
        folders = []
        for number in (0, 1):
            run = RunDir(tmp_path / f"run {number}")
            run.begin_attempt()
            save(run, one_process(number), step=1)
            folders.append(run.checkpoint_dir(1))
        yield folders[0], folders[1]


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_checkpoints_tensors_are_its_own(checkpoints: tuple[Path, Path], how: str) -> None:
    own, other = checkpoints
    load_checkpoint(own, *one_process(2))
    index = own / "tensors.json"
    there = leads_to(other / "rank-0.safetensors", own, how)
    index.write_text(index.read_text().replace("rank-0.safetensors", there))
    for load in (load_checkpoint, lambda folder, parameters, _: load_weights(folder, parameters)):
        with pytest.raises(CheckpointError, match="rank-0.safetensors") as raised:
            load(own, *one_process(2))
        assert is_one_line(str(raised.value))


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_checkpoints_state_names_its_own_files(checkpoints: tuple[Path, Path], how: str) -> None:
    own, other = checkpoints
    path, there = own / "state.json", leads_to(other / "tensors.json", own, how)
    state = json.loads(path.read_text())
    facts = json.loads((other / "state.json").read_text())["files"]["tensors.json"]
    state["files"] = {"rank-0.safetensors": state["files"]["rank-0.safetensors"], there: facts}
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="tensors.json") as raised:
        load_checkpoint(own, *one_process(2))
    assert is_one_line(str(raised.value))
    assert is_one_line(str(damage(own, 0, 1))), "nor is it taken for whole"


# -- datasets -------------------------------------------------------------------------------------

SECRET, HARMLESS = "a secret text ", "the quick brown fox "


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = write_tokenizer(tmp_path / "encoder")
    (folder / "config.json").write_text('{"model_type": "nemotron_h"}')
    return folder


def texts(folder: Path, encoder: Path) -> list[str]:
    """The rows that a dataset in a folder gives."""
    data = section(folder, dataset={"type": "completion"})
    prepared = folder.parent / "prepared"
    plan = plan_data(data, str(encoder), str(prepared))
    tasks = [window_task(plan, window, data, str(encoder), held_out=False) for window in plan.windows]
    return [row["text"] for task in tasks for row in read_rows(task)]


def saved(folder: Path, text: str) -> Path:
    """As `save_to_disk` leaves it."""
    datasets.Dataset.from_list([{"text": text * 9}] * 40).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_names_its_own_files(tmp_path: Path, encoder: Path) -> None:
    own, other = saved(tmp_path / "own", HARMLESS), saved(tmp_path / "other", SECRET)
    assert set(texts(own, encoder)) == {HARMLESS * 9}
    state = json.loads((own / "state.json").read_text())
    (file,) = [path for path in other.iterdir() if path.suffix == ".arrow"]
    state["_data_files"] = [{"filename": leads_to(file, own, "above")}]
    (own / "state.json").write_text(json.dumps(state))
    with pytest.raises(NemoRayError) as raised:
        texts(own, encoder)
    assert is_one_line(str(raised.value))


def test_a_saved_datasets_splits_are_its_own(tmp_path: Path, encoder: Path) -> None:
    saved(tmp_path / "other", SECRET)
    own = tmp_path / "own"
    saved(own / "train", HARMLESS)
    (own / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert set(texts(own, encoder)) == {HARMLESS * 9}
    (own / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(NemoRayError) as raised:
        texts(own, encoder)
    assert is_one_line(str(raised.value))


ELSEWHERE: list[dict[str, Any]] = [
    {"data_files": "../other/rows.jsonl"},
    {"data_files": "{other}/rows.jsonl"},
    {"data_files": "file:{other}/rows.jsonl"},
    {"data_files": "local:{other}/*"},
    {"data_files": "simplecache::{other}/rows.jsonl"},
    {"data_dir": "{other}"},
    {"data_dir": "../other"},
    {"data_dir": "{other}", "data_files": "*.jsonl"},
]


def carded(entry: dict[str, Any], other: Path) -> str:
    """A card with one configuration."""
    values = {key: value.format(other=other) for key, value in entry.items()}
    return f"---\n{yaml.safe_dump({'configs': [{'config_name': 'one', **values}]})}---\n"


@pytest.mark.parametrize("entry", ELSEWHERE, ids=str)
def test_a_card_in_a_folder_brings_no_rows_from_elsewhere(
    tmp_path: Path, encoder: Path, entry: dict[str, Any]
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    write_lines(own / "rows.jsonl", [{"text": HARMLESS * 9}] * 40)
    write_lines(other / "rows.jsonl", [{"text": SECRET * 9}] * 40)
    (own / "README.md").write_text(carded({"data_files": "rows.jsonl"}, other))
    assert set(texts(own, encoder)) == {HARMLESS * 9}
    (own / "README.md").write_text(carded(entry, other))
    with pytest.raises(NemoRayError) as raised:
        texts(own, encoder)
    assert is_one_line(str(raised.value))


@pytest.mark.parametrize("entry", ELSEWHERE, ids=str)
def test_a_card_does_not_even_list_what_is_elsewhere(tmp_path: Path, entry: dict[str, Any]) -> None:
    """Nor walks through it: a `data_dir: /` would be the whole disk."""
    other = tmp_path / "other"
    write_lines(other / "rows.jsonl", [{"text": SECRET}])
    with pytest.raises(ConfigError, match="names files elsewhere"):
        found = card.files_by_split(["a.csv"], carded(entry, other), None, "datasets[0]", "o/n")
        assert not found, found


def test_a_card_of_the_hub_brings_no_rows_from_elsewhere(tmp_path: Path, encoder: Path) -> None:
    """Through the command; the secret is where the card says."""
    other = tmp_path / "other"
    write_lines(other / "rows.jsonl", [{"text": SECRET * 9}] * 40)
    with HubServer() as hub:
        files = {"README.md": carded({"data_dir": "{other}"}, other).encode(), "a.jsonl": b"{}"}
        hub.add("datasets/owner/rows", files)
        arguments = ["-m", "nemo_ray.data", "config.yaml", "--show", "1"]
        entries = [{"path": "owner/rows", "type": "completion"}]
        done = command(hub, encoder, tmp_path, *arguments, datasets=entries)
    assert done.returncode == 2 and is_one_line(done.stderr), done.stderr
    assert SECRET not in done.stdout + done.stderr


# -- prepared data --------------------------------------------------------------------------------


def test_the_plan_in_a_runs_folder_names_no_shards(tmp_path: Path) -> None:
    """Shards are those of the plan that the driver makes anew: one that says otherwise is refused."""
    run, plan = RunDir(tmp_path / "run"), data_plan()
    run.path.mkdir()
    publish_json(run.data_plan_file, plan.to_json())
    outputs.check_plan(run, plan)
    outside = Window(0, plan.windows[0].spans, plan.windows[0].num_rows, "../../secret")
    forged = {**plan.to_json(), "windows": WindowList([outside]).to_json()}
    publish_json(run.data_plan_file, forged)
    with pytest.raises(ConfigError, match="changed since the run began") as raised:
        outputs.check_plan(run, plan)
    assert is_one_line(str(raised.value))
    publish_json(run.data_plan_file, {**plan.to_json(), "directory": str(tmp_path / "secret")})
    outputs.check_plan(run, plan)
    assert plan.shard_path(plan.windows[0]) == "prepared/key.arrow", "the directory is the driver's too"
