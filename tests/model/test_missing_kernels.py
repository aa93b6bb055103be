"""A GPU without one of the two kernel packages runs the reference, and the user is told."""

import sys
import types

import pytest
import torch

from nemo_ray.model import ssd

CUDA = torch.device("cuda")


@pytest.mark.parametrize("package", ["causal_conv1d", "mamba_ssm"])
def test_the_reference_runs_and_a_line_says_why(package, monkeypatch):
    for name in ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"{package}.ops.triton.ssd_combined", raising=False)
    line = ssd.missing_kernels(CUDA)
    assert line is not None and line.startswith(f"{package} is not installed") and "the extra `cuda`" in line
    assert "1.7 times as long" in line
    assert ssd.select_split_conv1d_scan(CUDA) is ssd.reference_scan
    assert ssd.select_chunk_scan(CUDA) is ssd.ssd_scan


def test_a_cpu_lacks_nothing():
    assert ssd.missing_kernels(torch.device("cpu")) is None
