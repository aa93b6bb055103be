"""Sweeps: the training job many times, with other settings. `python -m nemo_ray.tune`, or `sweep` here."""

from nemo_ray.tune.library import SweepResult, TrialResult, merge, read_result, sweep

__all__ = ["SweepResult", "TrialResult", "merge", "read_result", "sweep"]
