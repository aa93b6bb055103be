"""Kernels compile with one of the configurations that they would be tuned over: seconds, not minutes."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_configuration_each():
    if not torch.cuda.is_available():
        return
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing
    from triton.runtime.autotuner import Autotuner

    for module in (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing):
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[-1:]
