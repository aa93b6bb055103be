"""Rank 0's figures as Ray's metrics: every node of a cluster gives them to Prometheus, as ray_<name>.

cluster/grafana has a dashboard of them. One more tracker: it is given the rows of metrics.jsonl.
"""

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from nemo_ray.run_dir import RunDir
from nemo_ray.train.trackers.rows import Row

PREFIX = "nemo_ray"
TAG = "run"
"""The run's output_dir, by its last name."""
# Field of a train row: (name, what it is).
GAUGES = {
    "step": ("step", "Optimizer steps done"),
    "epoch": ("epoch", "Passes over the rows"),
    "loss": ("loss", "Training loss of the last logged step"),
    "lr": ("learning_rate", "Learning rate"),
    "grad_norm": ("gradient_norm", "Norm of the gradient before clipping"),
    "tokens_per_s": ("tokens_per_second", "Tokens a second, all workers together"),
    "step_s": ("step_seconds", "Seconds of the last logged step"),
    "mfu": ("model_flops_utilization", "Rate of the model's products over the data sheet's, 0 to 1"),
    "expert_max_violation": (
        "expert_max_violation",
        "Load of the busiest expert above an even one, averaged over layers; on rank 0",
    ),
    "peak_memory_bytes": ("peak_memory_bytes", "Most memory that rank 0 has held"),
    "nonfinite_steps": ("nonfinite_steps", "Steps that were skipped for a loss or gradient without value"),
}
COUNTERS = {
    "tokens": ("tokens_total", "Tokens of logged steps"),
    "target_tokens": ("target_tokens_total", "Trained tokens of logged steps"),
    "data_wait_s": ("data_wait_seconds_total", "Seconds of waiting for data that was not prepared yet"),
    "checkpoint_s": ("checkpoint_seconds_total", "Seconds for which checkpoints kept training from going on"),
}
EVAL_LOSS = ("eval_loss", "Loss over the held-out rows")
RESTARTS = ("restarts", "Times that workers were started again since the driver began")


def names() -> list[str]:
    """Of all metrics, as Prometheus sees them."""
    known = [*GAUGES.values(), *COUNTERS.values(), EVAL_LOSS, RESTARTS]
    return [f"ray_{PREFIX}_{name}" for name, _ in known]


class RayMetrics:
    """The metrics of one start of a run."""

    name = "Ray's metrics"

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._tags = {TAG: run.place.rstrip("/").rpartition("/")[2]}

    def open(self) -> None:
        self._gauges = {field: _make(Gauge, *told) for field, told in GAUGES.items()}
        self._counters = {field: _make(Counter, *told) for field, told in COUNTERS.items()}
        self._eval_loss = _make(Gauge, *EVAL_LOSS)
        self._restarts = _make(Gauge, *RESTARTS)
        self._restarts.set(sum(failure["restart"] for failure in self._run.read_failures()), self._tags)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if "eval_loss" in row:
                self._eval_loss.set(row["eval_loss"], self._tags)
                continue
            for field, gauge in self._gauges.items():
                if row[field] is not None:
                    gauge.set(row[field], self._tags)
            for field, counter in self._counters.items():
                if row[field]:  # Ray refuses to add nothing
                    counter.inc(row[field], self._tags)

    def flush(self) -> None:
        """Ray sends them every few seconds by itself."""

    def close(self, outcome: str) -> None:
        """They go with this process."""


def _make(kind: type, name: str, description: str) -> Gauge | Counter:
    return kind(f"{PREFIX}_{name}", description=description, tag_keys=(TAG,))
