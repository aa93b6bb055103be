"""Kernels that would be timed in many tilings are not, while the doctor looks."""

import pytest

from nemo_ray.doctor.exactness import untuned

triton = pytest.importorskip("triton")


def test_kernels_take_their_smallest_tiles() -> None:
    configs = [
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 256}, num_stages=3),
        triton.Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_stages=5),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_stages=4),
    ]

    @triton.autotune(configs=configs, key=["size"])
    @triton.jit
    def kernel(size, BLOCK_M, BLOCK_N):
        pass

    assert kernel.prune_configs({}) == configs
    with pytest.raises(KeyboardInterrupt), untuned():
        assert kernel.prune_configs({}) == configs[1:2]
        raise KeyboardInterrupt
    assert kernel.prune_configs({}) == configs
