"""A bad step on a GPU, where the host learns of it one step later: whole runs of the worker's code."""

import pytest
import torch

from nemo_ray.run_dir import RunDir
from nemo_ray.train.worker import run_worker
from tests.group import group_of_one
from tests.train.poison import lonely_token, poisoned
from tests.train.runs import Runs
from tests.train.test_nonfinite import (
    BAD,
    OPTIMIZERS,
    SHORT,
    assert_ends_with_the_weights_of_before,
    assert_skipped,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
GRAPHS = pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("nonfinite"))


@GRAPHS
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("limit", [1, 3])
def test_the_weights_of_before_are_saved_whenever_the_host_learns_of_it(
    runs: Runs, limit: int, optimizer: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = f"{optimizer}-{limit}-{graphs}", {"optimizer": optimizer, "cuda_graphs": graphs}
    assert_ends_with_the_weights_of_before(runs, name, GPU, limit, monkeypatch, **changes)


@GRAPHS
def test_a_run_goes_on_behind_a_bad_step(runs: Runs, graphs: bool) -> None:
    settings = {**SHORT, "cuda_graphs": graphs}
    clean = runs.spec(f"clean-{graphs}", **settings)
    base = poisoned(runs.base, runs.folder / f"base-{graphs}", lonely_token(clean, BAD, 1))
    bad = runs.spec(f"bad-{graphs}", **{**settings, "base_model": str(base)})
    for spec in (bad, clean):
        with group_of_one():
            run_worker(spec, GPU, lambda figures: None)
    assert_skipped(RunDir(bad.output_dir), RunDir(clean.output_dir))
