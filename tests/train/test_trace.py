"""A Chrome trace's figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ray.train import trace


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_overlaps_count_once(spans):
    intervals = [(start, start + length) for start, length in spans]
    covered = {tick for start, end in intervals for tick in range(start, end)}
    assert trace.union(intervals) == len(covered)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matmul"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm", "matmul"),
        ("void gemvNSP_kernel<float, float, float, 1, 32, 4, 1024>", "matmul"),
        ("_bmm_chunk_fwd_kernel", "scan and conv"),
        ("_chunk_scan_chunk_state_bwd_dx_kernel", "scan and conv"),
        ("_state_passing_fwd_kernel", "scan and conv"),
        ("void causal_conv1d_channellast_fwd_kernel<Causal_conv1d_channellast_fwd", "scan and conv"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add", "other"),
        ("Memcpy DtoH (Device -> Pageable)", "host copies"),
        ("Memcpy HtoD (Pinned -> Device)", "host copies"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ],
)
def test_kernels_have_classes(name, kind):
    assert trace.kernel_class(name) == kind


def event(cat: str, name: str, ts: float, dur: float) -> dict:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur}


def test_a_trace_is_summed_up():
    """Two steps: overlapping kernels in a graph, then a graph and a copy to the host that is waited for."""
    events = [
        {"name": "process_name", "ph": "M"},
        event("cuda_runtime", "cudaDeviceSynchronize", 0, 1),  # the profiler's, as it begins
        event("cuda_runtime", "cudaGraphLaunch", 10, 2),
        event("kernel", "nvjet_a", 20, 3000),
        event("kernel", "_chunk_scan_fwd_kernel", 2020, 2000),
        event("cuda_driver", "cuLaunchKernelEx", 3000, 2),
        event("kernel", "elementwise", 5000, 1000),
        event("cuda_runtime", "cudaGraphLaunch", 6000, 2),
        event("gpu_user_annotation", "a range", 0, 99999),
        event("kernel", "nvjet_a", 7000, 1000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 8000, 1000),
        event("cuda_runtime", "cudaMemcpyAsync", 8100, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 8200, 900),
        event("cuda_runtime", "cudaLaunchKernel", 9100, 2),  # the one that ends the steps
        event("kernel", "fill", 9200, 1000),
        event("cuda_runtime", "cudaDeviceSynchronize", 9300, 1000),
    ]
    found = trace.summarize(events, num_steps=2)
    assert found["busy_ms"] == (4.0 + 1.0 + 1.0 + 1.0) / 2
    assert found["class_ms"] == {
        "communication": 0.0,
        "scan and conv": 1.0,
        "attention": 0.0,
        "matmul": 2.0,
        "host copies": 0.5,
        "other": 0.5,
    }
    assert found["host_copies_alone_ms"] == 0.5
    assert (found["kernels"], found["launches"]) == (2.0, 1.5)
    assert (found["synchronizations"], found["copies_to_host"]) == (0.5, 0.5)
    assert found["largest"][0] == {"name": "nvjet_a", "class": "matmul", "ms": 2.0, "calls": 1.0}
    assert [kernel["ms"] for kernel in found["largest"]] == [2.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "kind", "alone"),
    [
        ("ncclDevKernel_AllGather_RING_LL", "communication", "communication_alone_ms"),
        ("Memcpy DtoH (Device -> Pinned)", "host copies", "host_copies_alone_ms"),
        ("Memcpy HtoD (Pinned -> Device)", "host copies", "host_copies_alone_ms"),
    ],
)
def test_what_kernels_can_hide_counts_alone_where_nothing_else_runs(name, kind, alone):
    events = [
        event("gpu_memcpy", name, 0, 3000),
        event("kernel", "nvjet_a", 1000, 1000),
        event("kernel", "nvjet_a", 2500, 2500),
        event("kernel", "fill", 9000, 1000),
    ]
    found = trace.summarize(events, num_steps=1)
    assert found["class_ms"][kind] == 3.0 and found["busy_ms"] == 5.0
    assert found[alone] == 1.5
    assert found["communication_alone_ms"] + found["host_copies_alone_ms"] == 1.5
