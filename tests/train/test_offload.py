"""Activations in host memory: the same gradients, and tensors of the GPU let go and brought back in time.

On GPUs in tests/gpu. Here a stand-in for CUDA's streams lets a CPU take the way of a GPU.
"""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.selftest import random_ids
from nemo_ray.train import offload
from nemo_ray.train.loss import bind_loss
from nemo_ray.train.offload import HostActivations, pinned
from tests.model.shapes import ALL_TARGETS, CPU, tiny_config
from tests.train import clocks

PATTERN = "MEMEM*EMEMME*EE-ME"
BATCH = PackedBatch.from_lengths(random_ids(128, (17, 23)), [[17, 23]])
LARGE = 40 * 32 * 4
"""Bytes of a tensor of a token's width, in float32."""


class Event:
    def __init__(self, stream: "Stream") -> None:
        self.stream, self.at = stream, len(stream.done)


class Stream:
    """Notes what is done on it, and that somebody waits for it."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    joined = False
    """Whether it waited for the stream that is recorded: before that it has no part in the graph."""

    def wait_stream(self, other: "Stream") -> None:
        self.joined = True

    def record_event(self) -> Event:
        assert self.joined, "the event would be of no use in a graph"
        return Event(self)

    def wait_event(self, event: Event) -> None:
        WAITED.append(event)


WAITED: list[Event] = []


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    WAITED.clear()
    yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", LARGE)


def model_of(**adapter: Any) -> torch.nn.Module:
    model, _ = build(
        tiny_config(pattern=PATTERN), AdapterSection(**(ALL_TARGETS | adapter)), Precision(), CPU
    )
    bind_loss(model)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight") or name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    return model.train()


def passes(model: torch.nn.Module, batch: PackedBatch = BATCH) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = -model.target_log_probs(batch, batch.input_ids).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


BLOCKS = {
    "experts": [index for index, kind in enumerate(PATTERN) if kind == "E"],
    "mamba": [index for index, kind in enumerate(PATTERN) if kind == "M"],
    "all": list(range(len(PATTERN))),
    "last": [len(PATTERN) - 1],
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_gradients_are_the_same(blocks: str, as_on_a_gpu: bool, streams: None) -> None:
    model = model_of()
    wanted = passes(model)
    moving = HostActivations(model, CPU)
    assert_equal(passes(model), wanted)
    if as_on_a_gpu:
        moving._stream = Stream()  # type: ignore[assignment]
    moving.move(BLOCKS[blocks])
    for index, block in enumerate(model.model.layers):
        block.recompute = index not in moving.moved
    assert moving.host_bytes == 0
    assert_equal(passes(model), wanted)
    held = moving.host_bytes
    assert held > LARGE * len(moving.moved) / 2
    assert_equal(passes(model), wanted)
    assert moving.host_bytes == held, "the same memory in every pass"
    if as_on_a_gpu:
        assert WAITED
    moving.move([])
    assert moving.host_bytes == 0
    assert_equal(passes(model), wanted)


def test_weights_stay_where_they_are() -> None:
    """A full fine-tune saves its weights too."""
    model, _ = build(tiny_config(pattern=PATTERN), AdapterSection(adapter=None), Precision(), CPU)
    bind_loss(model)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    model.train()
    wanted = passes(model)
    moving = HostActivations(model, CPU)
    moving.move(BLOCKS["all"])
    sent: list[int] = []
    of_blocks: list[tuple[int, int]] = []
    send = moving._send

    def noted(index: int, storage: torch.UntypedStorage) -> Any:
        sent.append(storage.data_ptr())
        of_blocks.append((index, storage.data_ptr()))
        return send(index, storage)

    moving._send = noted  # type: ignore[method-assign]
    assert_equal(passes(model), wanted)
    assert len(set(of_blocks)) == len(of_blocks), "what a block saves twice is sent once"
    assert sent and not {p.untyped_storage().data_ptr() for p in model.parameters()} & set(sent)


def test_memory_of_the_gpu_is_let_go_and_comes_back_ahead(streams: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(offload, "AHEAD", 4)
    monkeypatch.setattr(offload, "BEHIND", 6)
    model, there = model_of(), dict[int, int]()
    moving = HostActivations(model, CPU)
    moving._stream = Stream()  # type: ignore[assignment]
    moving.move(BLOCKS["experts"])

    def held() -> list[int]:
        """Blocks of which something lies on the GPU."""
        return [i for i, saved in moving._saved.items() if any(one.device is not None for one in saved)]

    late: list[int] = []
    before = moving._before_backward

    def noted(index: int) -> None:
        if index in moving.moved and any(one.device is None for one in moving._saved[index] if one.uses):
            late.append(index)
        before(index)
        there[index] = len(held())
        assert all(index - 4 <= one <= index for one in held())

    moving._before_backward = noted  # type: ignore[method-assign]
    forward, most = moving._before_forward, [0]

    def counted(index: int) -> None:
        forward(index)
        assert all(one > index - 6 for one in held())
        most[0] = max(most[0], len(held()))

    moving._before_forward = counted  # type: ignore[method-assign]
    passes(model)
    assert not held() and not moving._leaving
    assert late == [max(moving.moved)] or not late, "only the last one cannot be fetched ahead"
    assert len(there) == len(PATTERN) and 1 < max(there.values()) < len(moving.moved)
    assert 1 < most[0] < len(moving.moved)


class Order(TorchDispatchMode):
    """Notes where compute and copies meet in an order that nothing holds them to."""

    def __init__(self, moving: HostActivations) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.out: dict[int, clocks.Work] = {}
        self.back: dict[int, clocks.Work] = {}
        """Copies, by address on the GPU."""
        self._moving, self._compute = moving, torch.cuda.current_stream()
        self._computed = self._compute.work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream = torch.cuda.current_stream()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        if stream is self._compute:
            if not all(stream.is_after(self.back[one]) for one in addresses if one in self.back):
                self.found.add("what is not back yet is used")
            self._computed = stream.work()
        elif func.name() == "aten::copy_":
            if not stream.is_after(self._computed):
                self.found.add("a copy before what it takes, or whose memory it takes, is done")
            hosts = {host.data_ptr() for host in self._moving._hosts.values()}
            copies, on_gpu = (self.out, addresses[1]) if addresses[0] in hosts else (self.back, addresses[0])
            copies[on_gpu] = stream.work()
        return func(*args, **(kwargs or {}))


def race(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a few passes leave open."""
    clocks.use_clocks(monkeypatch)
    model = model_of()
    moving = HostActivations(model, CPU)
    moving._stream = clocks.Stream("copies")  # type: ignore[assignment]
    moving.move(BLOCKS["experts"] + BLOCKS["mamba"])
    order, let_go = Order(moving), moving._let_go

    def noted(*args: Any) -> None:
        leaving = [one.device.data_ptr() for _, _, saved in moving._leaving for one in saved]
        let_go(*args)
        left = {one.device.data_ptr() for _, _, saved in moving._leaving for one in saved}
        gone = [address for address in leaving if address not in left]
        if not all(torch.cuda.current_stream().is_after(order.out[address]) for address in gone):
            order.found.add("memory is let go before it has been copied")

    moving._let_go = noted  # type: ignore[method-assign]
    with order:
        for _ in range(2):
            passes(model)
    assert order.out and order.back
    return order.found


def test_copies_and_compute_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not race(monkeypatch)


def test_an_order_that_is_left_open_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either wait the test above would fail."""
    with monkeypatch.context() as patch:
        patch.setattr(clocks.Stream, "wait_event", lambda *_: None)
        assert any("not back yet" in one for one in race(patch))
        assert any("let go before" in one for one in race(patch))
    with monkeypatch.context() as patch:
        patch.setattr(clocks.Stream, "wait_stream", lambda *_: None)
        assert any("a copy before" in one for one in race(patch))


def test_a_pass_that_is_given_up_harms_none_after_it() -> None:
    model = model_of()
    wanted = passes(model)
    moving = HostActivations(model, CPU)
    moving.move(BLOCKS["experts"])
    with torch.no_grad():
        model.target_log_probs(BATCH, BATCH.input_ids)
    assert moving.host_bytes == 0, "evaluation saves nothing"
    model.target_log_probs(BATCH, BATCH.input_ids)  # and no backward pass
    assert_equal(passes(model), wanted)
    broken = model.model.layers[BLOCKS["experts"][1]].mixer.experts
    forward, broken.forward = broken.forward, lambda *given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        passes(model)
    broken.forward = forward
    assert_equal(passes(model), wanted)


def test_batches_of_other_sizes_take_other_memory() -> None:
    model = model_of()
    moving = HostActivations(model, CPU)
    moving.move(BLOCKS["experts"])
    longer = PackedBatch.from_lengths(random_ids(128, (64, 32)), [[64, 32]])
    passes(model)
    small = moving.host_bytes
    passes(model, longer)
    assert moving.host_bytes > small
    assert_equal(passes(model), passes(model))


def test_blocks_that_save_nothing_take_no_part(streams: None) -> None:
    """Those before all adapters have no backward pass."""
    few = {"lora_target_modules": ("q_proj", "v_proj"), "lora_target_parameters": ()}
    model = model_of(lora_target_linear=False, **few)
    wanted = passes(model)
    moving = HostActivations(model, CPU)
    moving._stream = Stream()  # type: ignore[assignment]
    moving.move(BLOCKS["all"])
    found = passes(model)
    assert moving._saved[0] == [] and moving._saved[PATTERN.index("*")] != []
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in passes(model).items())


def test_memory_of_blocks_that_stay_is_given_back() -> None:
    model = model_of()
    moving = HostActivations(model, CPU)
    moving.move(BLOCKS["experts"])
    passes(model)
    hosts = [weakref.ref(host) for host in moving._hosts.values()]
    moving.move(BLOCKS["mamba"])
    passes(model)
    gc.collect()
    assert hosts and not any(host() is not None for host in hosts)


def test_what_the_host_has_no_memory_for_stays_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    wanted, taken = passes(model), list[int]()
    moving = HostActivations(model, CPU)
    moving.move(BLOCKS["experts"])
    given = pinned

    def few(num_bytes: int, device: torch.device) -> torch.Tensor:
        taken.append(num_bytes)
        if len(taken) > 3:
            raise RuntimeError(f"no {num_bytes} bytes")
        return given(num_bytes, device)

    monkeypatch.setattr(offload, "pinned", few)
    for _ in range(2):
        assert_equal(passes(model), wanted)
    assert len(taken) == 4 and moving.host_bytes == sum(taken[:3])
    assert [record.message for record in caplog.records] == [
        f"no {taken[3]} bytes: activations stay on the GPU"
    ]


def test_no_more_is_to_be_moved_than_the_system_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pinned

    def at_most(num_bytes: int, device: torch.device) -> torch.Tensor:
        if num_bytes > 3 * LARGE:
            raise RuntimeError("no")
        return given(num_bytes, device)

    monkeypatch.setattr(offload, "pinned", at_most)
    assert offload._largest_pinned(3 * LARGE, CPU) == 3 * LARGE
    assert offload._largest_pinned(16 * LARGE, CPU) == 2 * LARGE
    assert offload._largest_pinned(LARGE - 1, CPU) == 0


def test_a_worker_that_may_pin_nothing_makes_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a spread base need all workers."""
    monkeypatch.setattr(offload, "_largest_pinned", lambda num_bytes, device: 0)
    made: list[int] = []

    def forward() -> torch.Tensor:
        made.append(1)
        return torch.zeros(())

    assert offload.movable_bytes(CPU, forward, 2**60) == 0 and len(made) == 2


def test_two_passes_at_a_time_are_refused() -> None:
    model = model_of()
    HostActivations(model, CPU).move(BLOCKS["experts"])
    first = model.target_log_probs(BATCH, BATCH.input_ids).sum()
    model.target_log_probs(BATCH, BATCH.input_ids)
    with pytest.raises(RuntimeError, match="another forward pass has taken the host memory"):
        first.backward()


class Clock:
    """Host and GPU, which does what is launched in that order; seconds."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0

    def launch(self, host_s: float, gpu_s: float) -> None:
        self.host += host_s
        self.gpu = max(self.gpu, self.host) + gpu_s

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu)


COPY_S, LAUNCH_S, KERNEL_S, KERNELS = 5e-3, 2e-3, 1e-3, 100


@pytest.mark.parametrize("launch_s", [LAUNCH_S, KERNEL_S / 10], ids=["slow host", "slow GPU"])
def test_what_can_be_moved_is_told_by_the_time_of_the_gpu(launch_s: float, monkeypatch: Any) -> None:
    """Not by that of the host, which waits for no launch where a graph is replayed."""
    clock = Clock()

    class Stamp:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = max(clock.gpu, clock.host)

        def elapsed_time(self, other: "Stamp") -> float:
            return 1e3 * (other.at - self.at)

    class Host:
        def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
            clock.launch(1e-5, COPY_S)

    def forward() -> torch.Tensor:
        for _ in range(KERNELS):
            clock.launch(launch_s, KERNEL_S)
        return torch.zeros(())

    monkeypatch.setattr(torch.cuda, "Event", Stamp)
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    monkeypatch.setattr(offload.time, "perf_counter", lambda: clock.host)
    monkeypatch.setattr(offload, "pinned", lambda num_bytes, device: Host())
    monkeypatch.setattr(offload, "available_bytes", lambda: 2**60)
    monkeypatch.setattr(offload, "_largest_pinned", lambda num_bytes, device: num_bytes)
    copied = offload.movable_bytes(CPU, forward, 2**60) / offload._PROBE_BYTES
    assert copied == pytest.approx(offload._HIDDEN * KERNELS * KERNEL_S / COPY_S, rel=0.05)
    monkeypatch.setattr(offload, "available_bytes", lambda: 2 * offload._PROBE_BYTES)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert offload.movable_bytes(CPU, forward, 2**60) == offload._PROBE_BYTES // 2
    assert offload.movable_bytes(CPU, forward, 1000) == 1000
