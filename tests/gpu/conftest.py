"""Kernels compile with one of the configurations that they would be tuned over: seconds, not minutes."""

from collections.abc import Iterator

import pytest
import torch

from nemo_ray.train.worker import configure_cuda


def mamba_kernels() -> Iterator:
    """mamba-ssm's tuned Triton kernels."""
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing
    from triton.runtime.autotuner import Autotuner

    for module in (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing):
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                yield kernel


def forget_compiled() -> None:
    """How dots take float32 inputs is no part of the key under which a process keeps a compiled kernel."""
    for kernel in mamba_kernels():
        while hasattr(kernel, "fn") and not hasattr(kernel, "device_caches"):
            kernel = kernel.fn
        kernel.device_caches.clear()


@pytest.fixture(autouse=True, scope="session")
def one_configuration_each():
    if torch.cuda.is_available():
        for kernel in mamba_kernels():
            kernel.configs = kernel.configs[-1:]


@pytest.fixture
def exact_float32(monkeypatch):
    """As a float32 run computes: no TF32, in torch and in Triton."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "")  # so that it is as before afterwards
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    configure_cuda(torch.float32, tf32=False)
    forget_compiled()
    yield
    forget_compiled()
