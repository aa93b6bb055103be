"""`nemo-ray doctor`: what it says of a configuration, its exit codes, and of a cluster's nodes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray.cli import main
from nemo_ray.doctor import inputs, machine
from nemo_ray.doctor.findings import OK, Finding, ok, warning
from tests.data.helpers import chats
from tests.e2e.nodes import nodes
from tests.hub_server import HubServer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all is well, at once."""
    monkeypatch.setattr(machine, "examine", lambda folders, computes: [ok("versions", "all of them")])


def write(tmp_path: Path, base: Path, **keys: Any) -> str:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats(5)))
    config = {"base_model": str(base), "datasets": [{"path": str(rows)}], "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | keys))
    return str(tmp_path / "run.yaml")


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Finding]]:
    """The exit code, and the findings of all places by subject."""
    code = main(["doctor", *arguments, "--json"])
    places = json.loads(capsys.readouterr().out)
    return code, {one["subject"]: Finding(**one) for lines in places.values() for one in lines}


@pytest.mark.usefixtures("well")
def test_all_is_well(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, write(tmp_path, base))
    assert code == 0 and {one.state for one in found.values()} == {OK}
    assert {"versions", "gloo", "workers", "base_model", "datasets[0]"} <= found.keys()
    assert main(["doctor", write(tmp_path, base)]) == 0
    shown = capsys.readouterr().out
    assert "  ok       base_model" in shown and "->" not in shown


@pytest.mark.usefixtures("well")
def test_what_a_configuration_names_and_is_not_there(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, base, datasets=[{"path": str(tmp_path / "none.jsonl")}])
    code, found = findings(capsys, config, f"base_model={tmp_path}/nothing")
    assert code == 1
    assert "does not exist" in found["base_model"].says
    assert found["base_model"].remedy.startswith("give the folder of the base model")
    assert found["datasets.0.path"].says.endswith("does not exist")
    rows = {"path": str(tmp_path / "rows.jsonl"), "split": "dev"}
    code, found = findings(capsys, write(tmp_path, base, datasets=[rows]))
    assert code == 1 and "dev" in found["datasets[0]"].says


@pytest.mark.usefixtures("well")
def test_workers_that_have_no_room(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, write(tmp_path, base, ray={"num_workers": 4, "use_gpu": True}))
    assert code == 1 and "4 workers with 1 GPU + 1 CPU each do not fit" in found["workers"].says
    assert "ray.num_workers" in found["workers"].remedy


def test_a_warning_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        machine, "examine", lambda folders, computes: [warning("disk", "full \x1b[31m", "make room")]
    )
    assert main(["doctor"]) == 3
    shown = capsys.readouterr().out
    assert "-> make room" in shown and "\x1b" not in shown


def test_a_wrong_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("base_modell: x\n")
    assert main(["doctor", str(tmp_path / "run.yaml")]) == 2
    assert "did you mean base_model?" in capsys.readouterr().err
    assert main(["doctor", ""]) == 2
    assert "CONFIG.yaml: '' names no file" in capsys.readouterr().err


@pytest.mark.usefixtures("well")
def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "--address", "127.0.0.1:1")
    assert code == 1 and "is not reachable" in found["connection"].says


def test_a_token_for_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    found = inputs.judge_token({})
    assert found.state == "warning" and "HF_TOKEN" in found.remedy
    assert inputs.judge_token({"HF_TOKEN": "x"}).state == OK
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "y")
    assert inputs.judge_token({}).state == OK


def test_what_the_hub_refuses_and_gives(base: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    rows = "".join(json.dumps(row) + "\n" for row in chats(5)).encode()
    with HubServer() as hub:
        hub.add_folder("owner/gated", base, access="gated")
        hub.add("datasets/owner/rows", {"README.md": b"", "train.jsonl": rows})
        keys = {"base_model": "owner/gated", "reinit_weights": True, "datasets": [{"path": "owner/rows"}]}
        config = write(tmp_path, base, **keys)

        def doctor(**variables: str) -> tuple[int, dict[str, Finding]]:
            kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            done = subprocess.run(
                [sys.executable, "-m", "nemo_ray.doctor", config, "--json"],
                env={**kept, **hub.environ(tmp_path / "home"), **variables},
                capture_output=True,
                text=True,
                timeout=120,
            )
            lines = json.loads(done.stdout)["the configuration"]
            return done.returncode, {one["subject"]: Finding(**one) for one in lines}

        code, found = doctor()
        assert code == 1 and "owner/gated is gated" in found["base_model"].says
        assert "accept the licence" in found["base_model"].remedy + found["base_model"].says
        assert found["datasets[0]"] == ok("datasets[0]", "owner/rows: 1 file")
        assert found["HF_TOKEN"].state == "warning"
        code, found = doctor(HF_TOKEN="hf_right")
        assert {one.state for one in found.values()} == {OK}
        assert not [path for path in (tmp_path / "home").rglob("train.jsonl")], "nothing is downloaded"


@pytest.mark.usefixtures("well")
def test_a_store_that_takes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("nemo_ray.object_store.ATTEMPTS", 1)
    monkeypatch.setattr("nemo_ray.object_store._answered", set())  # else it is waited for two minutes
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    config = write(tmp_path, base, output_dir="s3://bucket/run", dataset_prepared_path=str(tmp_path / "p"))
    code, found = findings(capsys, config)
    assert code == 1 and found["output_dir"].state == "error"


@pytest.mark.e2e
@pytest.mark.long
def test_every_node_of_a_cluster(base: Path, tmp_path: Path) -> None:
    """One of three has another home and no shared folder; within the time that is promised."""
    config = write(tmp_path, base, output_dir="~/run", ray={"num_workers": 2})
    with nodes(tmp_path, 2) as cluster:
        cluster.add(1, HOME=str(tmp_path))
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "nemo_ray.doctor", config, "--address", cluster.address, "--json"],
            env={**os.environ, **cluster.environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        took_s = time.monotonic() - began_s
    assert done.stdout, done.stderr
    places = json.loads(done.stdout)
    there = [lines for place, lines in places.items() if place.startswith("node ")]
    assert len(there) == 2
    for lines in there:
        states = {one["subject"]: one["state"] for one in lines}
        assert states["versions"] == states["exactness"] == states["object store"] == "ok", lines
    whole = {one["subject"]: one["state"] for one in places[f"the cluster at {cluster.address}"]}
    wanted = (
        "versions",
        "workers",
        "authentication",
        "dashboard",
        "clocks",
        "ports",
        "gloo",
        "shared folders",
    )
    assert {name: whole.get(name) for name in wanted} == dict.fromkeys(wanted, "ok"), whole
    assert done.returncode in (0, 3) and took_s < 60
