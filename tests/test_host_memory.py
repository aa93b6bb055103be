"""What memory is left: the smaller of the machine's and the container's."""

from pathlib import Path

import pytest

from nemo_ray import host_memory
from nemo_ray.host_memory import available_bytes


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "_OURS", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    ("most", "used", "left"),
    [(None, None, 4 << 20), ("max", "5", 4 << 20), ("3000000", "1500000", 2_000_000), ("5", "500009", 0)],
)
def test_the_container_counts_where_it_has_a_limit(
    machine: Path, most: str | None, used: str | None, left: int
) -> None:
    (machine / "meminfo").write_text("MemTotal: 9999 kB\nMemFree: 1 kB\nMemAvailable:    4096 kB\n")
    for name, text in (
        ("memory.max", most),
        ("memory.current", used),
        ("memory.stat", "anon 7\ninactive_file 500000"),
    ):
        if text is not None:
            (machine / name).write_text(f"{text}\n")
    assert available_bytes() == left


def limited(group: Path, names: tuple[str, str, str], limit: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in zip(
        (*names[:2], "memory.stat"), (limit, "700", f"{names[2]} 200\nanon 7"), strict=True
    ):
        (group / name).write_text(f"{text}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("ours", "where", "names", "left"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", V2, 1000 - 500),
        ("0::/slurm/job_7", "slurm/job_7", V2, 1000 - 500),
        ("0::/slurm/job_8", "slurm/job_7", V2, 4 << 20),
        ("0::/docker/seen-from-outside", ".", V2, 1000 - 500),
        ("9:cpu,memory:/slurm/job_7\n1:name=systemd:/x", "memory/slurm", V1, 1000 - 500),
        ("9:cpu,memory:/slurm/job_7\n0::/", "memory", V1, 1000 - 500),
        ("9:cpu:/slurm/job_7", "memory/slurm/job_7", V1, 4 << 20),
    ],
)
def test_a_job_without_a_container_of_its_own_has_a_limit_too(
    machine: Path, ours: str, where: str, names: tuple[str, str, str], left: int
) -> None:
    (machine / "meminfo").write_text("MemAvailable:    4096 kB\n")
    (machine / "cgroup").write_text(f"{ours}\n")
    limited(machine / where, names, "1000")
    assert available_bytes() == left
    limited(machine / where, names, "max" if names == V2 else str(2**63 - 4096))
    assert available_bytes() == 4 << 20


def test_elsewhere_it_is_not_known() -> None:
    assert available_bytes() is None
