"""`mfu` of a row: its speed over what the GPUs' data sheets allow."""

from pathlib import Path

import pytest
import torch

from nemo_ray.plan import count_active, seen_gpu
from nemo_ray.targets import read_shape
from nemo_ray.train import worker
from tests.e2e.compare import train_rows
from tests.group import group_of_one
from tests.train.runs import Runs


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_their_drivers_names(device_name: str, gpu: str | None) -> None:
    found = seen_gpu(device_name)
    assert (None if found is None else found.name) == gpu


def test_speed_over_the_data_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path)
    spec = runs.spec("speed", test_datasets=[], eval_steps=None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with group_of_one():
        top = worker.top_speed(spec.config, str(runs.base), torch.device("cuda"))
        assert worker.top_speed(spec.config, str(runs.base), torch.device("cpu")) is None
    assert top == pytest.approx(989e12 / (4 * count_active(read_shape(str(runs.base)))))
    monkeypatch.setattr(worker, "top_speed", lambda config, base, device: 1000.0)
    rows = train_rows(runs.run("speed", test_datasets=[], eval_steps=None))
    assert len(rows) == 6
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] / 1000)
