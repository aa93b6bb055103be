"""Each line that is told of a machine, good and bad."""

import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nemo_ray.doctor import exactness, machine
from nemo_ray.doctor.findings import ERROR, OK, WARNING, from_line, ok, warning, worst
from nemo_ray.doctor.machine import Gpu, Torch
from nemo_ray.errors import PatchError

GIB = 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, GIB // 2, "580.1")
CUDA = Torch("2.13.0", "13.0", True)


def test_this_machine_is_well_but_for_what_it_lacks(tmp_path: Path) -> None:
    found = {one.subject: one for one in machine.examine({"output_dir": str(tmp_path / "new")})}
    assert found["versions"].state == OK and "torch" in found["versions"].says
    assert found["exactness"].state == OK
    assert str(tmp_path) in found["output_dir"].says
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ({"ray": "2.60.0"}, "peft is missing"),
        ({"ray": "2.59.1", "peft": "1.0"}, "ray 2.59.1 (>=2.60 is needed)"),
    ],
)
def test_versions(installed: dict[str, str], says: str) -> None:
    wanted = [Requirement("ray[data]>=2.60"), Requirement("peft>=0.21")]
    found = machine.judge_versions(installed, wanted)
    assert found.state == ERROR and says in found.says and "pip install" in found.remedy
    assert machine.judge_versions({"ray": "2.60.0", "peft": "0.21"}, wanted).state == OK


def test_what_the_package_needs_is_known_and_here() -> None:
    names = {wanted.name for wanted in machine.requirements()}
    assert {"ray", "torch", "peft"} <= names and "wandb" not in names and "mamba-ssm" not in names
    assert machine.judge_versions(machine.installed_versions(), machine.requirements()).state == OK


def test_gpus() -> None:
    fine, memory = machine.judge_gpus([H100, H100], CUDA)
    assert (fine.state, memory.state) == (OK, OK) and "2 x NVIDIA H100" in fine.says
    (none,) = machine.judge_gpus([], CUDA)
    assert none.state == OK
    (built,) = machine.judge_gpus([H100], CUDA._replace(cuda=None))
    assert built.state == ERROR and "without CUDA" in built.says and "build of torch" in built.remedy
    (driver,) = machine.judge_gpus([H100], CUDA._replace(available=False))
    assert driver.state == ERROR and "update the driver" in driver.remedy
    _, busy = machine.judge_gpus([H100, H100._replace(used_bytes=30 * GIB)], CUDA)
    assert busy.state == WARNING and "GPU 1: 30.0 of 80.0 GiB" in busy.says


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 1024, 580.159.04'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.find_gpus() == [Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, GIB, "580.159.04")]
    script.write_text("#!/bin/sh\nexit 9\n")
    assert machine.find_gpus() == []


def test_a_model_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: object) -> float:
        raise PatchError("packed documents see each other")

    def fail(device: object) -> float:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(exactness, "measure", refuse)
    (refused,) = machine.judge_arithmetic(gpu=False)
    assert refused.state == ERROR and refused.says == "packed documents see each other"
    monkeypatch.setattr(exactness, "measure", fail)
    (failed,) = machine.judge_arithmetic(gpu=False)
    assert failed.state == ERROR and failed.says.endswith("RuntimeError: no kernel image")


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would say it; this machine has none."""
    monkeypatch.setattr(exactness, "measure", lambda device: 1e-5)
    missing, exact = machine.judge_arithmetic(gpu=True)
    assert missing.state == WARNING and "causal_conv1d is not installed" in missing.says
    assert "cuda" in missing.remedy and exact.state == OK
    assert machine.judge_exactness(2e-3, "cuda").state == ERROR
    assert machine.judge_exactness(5e-4, "cuda").state == OK


def test_disks(tmp_path: Path) -> None:
    for free, state in ((50 * GIB, OK), (5 * GIB, WARNING), (GIB // 2, ERROR)):
        found = machine.judge_disk("output_dir", str(tmp_path), lambda path, free=free: (0, 0, free))
        assert found.state == state and found.subject == "output_dir"
    (tmp_path / "file").write_text("")
    assert machine.judge_disk("output_dir", str(tmp_path / "file" / "run")).state == ERROR
    assert machine.judge_disk("output_dir", "/proc/run").state == ERROR, "nothing can be written there"


def test_shared_memory() -> None:
    assert machine.judge_shared_memory(64 * 2**20).state == WARNING
    assert "--shm-size" in machine.judge_shared_memory(64 * 2**20).remedy
    assert machine.judge_shared_memory(GIB).state == machine.judge_shared_memory(None).state == OK
    assert machine.shared_memory_bytes()


def test_states_and_remedies() -> None:
    assert worst([ok("a", "b"), warning("c", "d", "e"), ok("f", "g")]) == WARNING
    assert worst([warning("c", "d", "e"), from_line("f", "x: y; do z")]) == ERROR
    assert worst([]) == OK
    assert from_line("f", "x; y; do z").remedy == "do z" and from_line("f", "plain").says == "plain"
