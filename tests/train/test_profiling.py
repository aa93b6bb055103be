"""`profiler_steps`: some steps of a run are recorded, and change nothing."""

import gzip
import json
from typing import Any

import pytest

from nemo_ray.run_dir import RunDir
from tests.e2e.compare import EXACT, train_rows
from tests.train.runs import Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def recorded(run: RunDir) -> tuple[dict[str, Any], int]:
    """The facts in run.json, and how often tokens were looked up in the trace."""
    trace = json.loads(gzip.decompress(run.profile_file.read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    return run.read_run()["profile"], names.count("aten::embedding")


def test_recorded_steps_are_those_asked_for_and_change_no_figure(runs: Runs) -> None:
    plain = runs.run("plain", test_datasets=[], eval_steps=None)
    assert not plain.profile_file.exists() and "profile" not in plain.read_run()
    run = runs.run("profiled", test_datasets=[], eval_steps=None, profiler_steps=2, profiler_steps_start=3)
    facts, embeddings = recorded(run)
    assert (facts["first_step"], facts["steps"], embeddings) == (4, 2, 2)
    assert facts["step_ms"] > 0
    keys = (*EXACT, "loss", "grad_norm")
    assert [[row[key] for key in keys] for row in train_rows(run)] == [
        [row[key] for key in keys] for row in train_rows(plain)
    ]


def test_a_run_that_ends_earlier_keeps_what_was_recorded(runs: Runs) -> None:
    facts, embeddings = recorded(
        runs.run("short", test_datasets=[], eval_steps=None, profiler_steps=9, profiler_steps_start=4)
    )
    assert (facts["first_step"], facts["steps"], embeddings) == (5, 2, 2)
    late = runs.run("late", test_datasets=[], eval_steps=None, profiler_steps=1, profiler_steps_start=6)
    assert not late.profile_file.exists(), "the run has six steps"
