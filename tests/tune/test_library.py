"""Sweeps from Python: what is refused raises, and what came of a sweep is read from its directory."""

from pathlib import Path

import pytest

from nemo_ray.errors import ConfigError
from nemo_ray.tune import read_result, sweep
from nemo_ray.tune.sweep_dir import Change, Population, SweepDir, TrialEnd


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """Three trials, one of which never ended."""
    folder = SweepDir(tmp_path / "sweep")
    points = [{"lora_r": 4}, {"lora_r": 8}, {"lora_r": 16}]
    folder.trial(0).path.mkdir(parents=True)
    folder.trial(2).path.mkdir(parents=True)
    folder.write_end(TrialEnd(0, "stopped", 1, 4.0, 10, "worse"))
    folder.write_end(TrialEnd(2, "finished", 3, 3.0, 30))
    facts = {"tune": {"metric": "eval_loss", "price_per_gpu_hour": 2.5}, "trials": points, "best": 2}
    folder.write({**facts, "trial_seconds": [900.0, 0.0, 1800.0], "trial_gpus": [2.0] * 3})
    return folder.path


def test_a_result_is_read_from_its_directory(done: Path) -> None:
    result = read_result(done)
    assert result.best is not None and result.best.params == {"lora_r": 16} and result.best.value == 3.0
    assert result.best.path == done / "trials" / "002"
    table = result.dataframe
    assert list(table["number"]) == [0, 2] and list(table["lora_r"]) == [4, 16]
    assert list(table["gpu_hours"]) == [0.5, 1.0] and list(table["cost"]) == [1.25, 2.5]
    assert list(table["eval_loss"]) == [4.0, 3.0] and list(table["status"]) == ["stopped", "finished"]


def test_parameters_of_a_population_are_those_of_its_end(done: Path) -> None:
    change = Change(1, 10, 2, 0, {"lora_r": 32})
    SweepDir(done).write_population(Population(1, (change,)))
    result = read_result(done)
    assert result.best is not None and result.best.params == {"lora_r": 32}
    assert list(result.dataframe["lora_r"]) == [4, 32]


def test_a_sweep_without_a_best_has_none(done: Path) -> None:
    folder = SweepDir(done)
    folder.write({**folder.read(), "best": None})
    assert read_result(done).best is None


def test_a_configuration_may_be_a_dictionary_and_stays_as_it_is() -> None:
    config = {"base_model": "/nowhere", "tune": {"parameters": {"lora_rr": [4]}}}
    with pytest.raises(ConfigError, match="lora_rr: unknown key; did you mean lora_r"):
        sweep(config)
    assert config["tune"] == {"parameters": {"lora_rr": [4]}}


def test_what_the_driver_refuses_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    config = {
        "base_model": str(base),
        "adapter": "lora",
        "lora_target_modules": ["q_proj"],
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
        "output_dir": str(tmp_path / "out"),
        "tune": {"parameters": {"lora_r": [4, 8]}},
    }
    with pytest.raises(ConfigError, match="is not the folder of a sweep"):
        sweep(config)
    assert "error: output_dir" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no sweep to resume"):
        sweep(config, resume=True)
