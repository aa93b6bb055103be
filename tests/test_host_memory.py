"""What memory is left: the smaller of the machine's and the container's."""

from pathlib import Path

import pytest

from nemo_ray import host_memory
from nemo_ray.host_memory import available_bytes


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
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


def test_elsewhere_it_is_not_known() -> None:
    assert available_bytes() is None
