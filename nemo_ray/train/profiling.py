"""A profile of some steps of a run, taken on rank 0: `profiler_steps`."""

import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nemo_ray.config.schema import TrainSection
from nemo_ray.run_dir import RunDir
from nemo_ray.train.trace import summarize


class StepProfiler:
    """Records the steps that the config asks for; writes profile.json.gz and, into run.json, what it says."""

    def __init__(self, train: TrainSection, run: RunDir, device: torch.device, rank: int) -> None:
        self.first = train.profiler_steps_start + 1
        self.last = train.profiler_steps_start + (train.profiler_steps or 0) if rank == 0 else 0
        self.run_dir, self.device = run, device
        self._recording: profile | None = None
        self._began_s = 0.0

    def begins_with(self, step: int) -> bool:
        """Whether the step of that number, which comes next, is the first one to be recorded."""
        return step == self.first <= self.last

    def begin(self) -> None:
        """Record from here on."""
        # On a GPU nothing of the host's is recorded but its calls to CUDA: the rest would slow the steps.
        kind = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._recording = profile(activities=[kind])
        self._wait()
        self._recording.start()
        self._began_s = time.perf_counter()

    def ends_with(self, step: int) -> bool:
        """Whether the step of that number, which was taken, is the last one to be recorded."""
        return self._recording is not None and step >= self.last

    def end(self, step: int) -> None:
        """Write what was recorded up to that step, if anything was and is not written yet."""
        if self._recording is None:
            return
        self._wait()
        steps = step - self.first + 1
        step_ms = (time.perf_counter() - self._began_s) * 1e3 / steps
        if self._on_gpu:
            torch.ones(1, device=self.device)  # the last launch: calls after it are the profiler's
        recording, self._recording = self._recording, None
        recording.stop()
        with tempfile.TemporaryDirectory(prefix="nemo-ray-profile-") as folder:
            path = Path(folder) / "trace.json"
            recording.export_chrome_trace(str(path))
            trace = path.read_bytes()
        facts: dict[str, Any] = {"first_step": self.first, "steps": steps, "step_ms": step_ms}
        if self._on_gpu:
            facts |= summarize(json.loads(trace)["traceEvents"], steps)
        self.run_dir.write_profile(gzip.compress(trace, compresslevel=3), facts)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
