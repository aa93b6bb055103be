"""--verbose reaches Ray and the workers of trials. What it prints then: tests/e2e/test_surroundings.py."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_ray import session
from nemo_ray.data.__main__ import main as prepare
from nemo_ray.errors import ClusterError
from nemo_ray.tune import trial
from nemo_ray.tune.__main__ import main as tune

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "config"),
    [(tune, "sweep-quickstart.yaml"), (prepare, "quickstart.yaml")],
    ids=["tune", "data"],
)
@pytest.mark.parametrize("words", [[], ["--verbose"]], ids=["quiet", "verbose"])
def test_ray_is_told(
    command: Callable[..., int],
    config: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def start_local(*arguments: object, verbose: bool = False, **more: object) -> None:
        told.append(verbose)
        raise ClusterError("no Ray for this test")

    monkeypatch.setattr(session, "start_local", start_local)
    assert command([str(ROOT / "configs" / config), f"output_dir={tmp_path / 'out'}", *words]) == 1
    assert told == [bool(words)]


@pytest.mark.parametrize("verbose", [False, True])
def test_workers_of_trials_are_told(verbose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(trial.cluster, "fit", lambda *arguments: told.append(arguments[-1]))
    run = SimpleNamespace(place=str(tmp_path), metrics_file=tmp_path / "metrics.jsonl")
    config, lock = SimpleNamespace(ray=None), SimpleNamespace(me=None, check=lambda: None)
    shared = trial.Shared(None, None, "eval_loss", None, verbose)
    assert trial._fit(run, {"config": config}, shared, lock, lambda found: None) == (trial.FINISHED, "")
    assert told == [verbose]
