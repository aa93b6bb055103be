"""Parts of a sweep made one: from folders or a store, whole or with trials missing, and what is no part."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray.errors import ConfigError
from nemo_ray.tune import merge
from nemo_ray.tune.__main__ import main
from nemo_ray.tune.load import Sweep, load_sweep
from nemo_ray.tune.shards import Shard, parse_shard
from nemo_ray.tune.sweep_dir import Change, Population, SweepDir, TrialEnd
from nemo_ray.view import report
from tests.object_store import ObjectStore, use

POINTS = [{"lora_r": 4}, {"lora_r": 8}, {"lora_r": 16}, {"lora_r": 32}]
VALUES = [3.0, 2.5, 2.0, 2.8]
FACTS: dict[str, Any] = {
    "tune": {"metric": "eval_loss", "mode": "min", "price_per_gpu_hour": 2.0},
    "trials": POINTS,
    "data_fingerprint": "abc",
    "outcome": "finished",
}


def write_part(path: Path, part: tuple[int, int], missing: tuple[int, ...] = (), **changes: Any) -> Path:
    """A part whose trials are as in VALUES; the weights of each say its number."""
    folder, own = SweepDir(path), Shard(*part).numbers(len(POINTS))
    for number in own:
        run = folder.trial(number)
        run.adapter_dir.mkdir(parents=True)
        (run.adapter_dir / "adapter_model.safetensors").write_text(str(number))
        run.write_run({})
        run.append_metrics({"step": 1, "loss": 9.0})
        run.append_metrics({"step": 2, "eval_loss": VALUES[number]})
        run.flush_metrics()
        if number not in missing:
            folder.write_end(TrialEnd(number, "finished", 1, VALUES[number], 2))
    config = {"output_dir": str(path), "learning_rate": 0.1, "lora_r": 1, "ray": {"num_workers": part[0]}}
    seconds = [1800.0 * (number in own) for number in range(len(POINTS))]
    spent = {"trial_seconds": seconds, "trial_gpus": [float(part[0])] * len(POINTS)}
    facts = {**FACTS, **spent, "shard": list(part), "config": config, "elapsed_s": 100.0 * part[0]}
    folder.write({**facts, **changes})
    return path


@pytest.fixture
def seven(tmp_path: Path) -> Sweep:
    """A sweep of seven trials."""
    return load(tmp_path, search="grid")


def load(folder: Path, **tune: Any) -> Sweep:
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "nemotron_h"}')
    (folder / "rows.jsonl").touch()
    keys = {"base_model": str(folder / "base"), "datasets": [{"path": str(folder / "rows.jsonl")}]}
    keys |= {"adapter": "lora", "lora_target_modules": ["q_proj"], "output_dir": str(folder / "out")}
    return load_sweep({**keys, "tune": {"parameters": {"lora_r": [1, 2, 3, 4, 5, 6, 7]}, **tune}})


def test_every_trial_is_in_one_part(seven: Sweep) -> None:
    for count in (1, 2, 3):
        parts = [parse_shard(f"{number}/{count}", seven).numbers(7) for number in range(1, count + 1)]
        assert sorted(number for part in parts for number in part) == list(range(7))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(seven: Sweep, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--shard: {text} is no part; give i/n"):
        parse_shard(text, seven)


def test_a_part_without_trials_is_refused(seven: Sweep, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard: 8/8 of 7 trials has none"):
        parse_shard("8/8", seven)


def test_a_search_that_learns_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard: optuna learns from all trials; set tune.search: random"):
        parse_shard("1/2", load(tmp_path, search="optuna"))


def test_parts_become_one_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_part(tmp_path / "one", (1, 2)), write_part(tmp_path / "two", (2, 2))
    whole = tmp_path / "whole"
    assert main(["merge", str(two), f"{one}/", "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert (
        "4 of 4 have ended, in 2 parts" in printed and "trial 2: eval_loss 2.0000 with lora_r=16" in printed
    )
    folder = SweepDir(whole)
    facts = folder.read()
    assert facts["best"] == 2 and facts["outcome"] == "finished" and facts["elapsed_s"] == 200.0
    assert (folder.best_dir / "adapter_model.safetensors").read_text() == "2"
    config = yaml.safe_load((folder.best_dir / "config.yaml").read_text())
    assert config["lora_r"] == 16 and config["output_dir"] == f"{whole}-best"
    assert [row.get("eval_loss") for row in folder.trial(3).read_metrics()] == [None, 2.8]
    page = folder.report_file.read_text()
    assert "<dt>Trials</dt><dd>4 of 4" in page and "trial 2, best" in page
    again = merge([one, two], tmp_path / "again")
    assert [trial.gpu_hours for trial in again.trials] == [0.5, 1.0, 0.5, 1.0]
    assert again.best is not None and again.best.cost == 1.0


def test_trials_that_have_not_ended_and_parts_that_are_missing(tmp_path: Path) -> None:
    one = write_part(tmp_path / "one", (1, 2), missing=(2,))
    result = merge([one], tmp_path / "whole")
    assert [trial.number for trial in result.trials] == [0] and result.best is not None
    assert SweepDir(result.path).read()["outcome"] == "stopped"
    none = write_part(tmp_path / "none", (1, 4), missing=(0,))
    assert merge([none], tmp_path / "empty").best is None


def test_parts_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = write_part(tmp_path / "two", (2, 2))
    one = write_part(tmp_path / "one", (1, 2))
    with ObjectStore() as store:
        use(store, monkeypatch)
        store.create_bucket("sweeps")
        for file in one.rglob("*"):
            if file.is_file():
                store.put("sweeps", f"mine/{file.relative_to(one)}", file.read_bytes())
        store.fail_some(0.1, seed=1, faults=("500", "503"))
        result = merge(["s3://sweeps/mine", two], tmp_path / "whole")
    assert len(result.trials) == 4 and result.best is not None and result.best.number == 2
    assert (result.path / "best" / "adapter_model.safetensors").read_text() == "2"


def test_a_merge_is_made_anew_also_after_one_that_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = write_part(tmp_path / "one", (1, 2)), write_part(tmp_path / "two", (2, 2))
    whole = tmp_path / "whole"
    assert [trial.number for trial in merge([one], whole).trials] == [0, 2]
    with monkeypatch.context() as broken:
        broken.setattr("nemo_ray.tune.merge._facts", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge([two], whole)
    assert [trial.number for trial in merge([one, two], whole).trials] == [0, 1, 2, 3]
    other_paths = {"chat_template": "/elsewhere/chat.jinja", "mlflow_tracking_uri": "file:///elsewhere"}
    config = SweepDir(two).read()["config"] | other_paths
    SweepDir(two).write({**SweepDir(two).read(), "config": config})
    assert len(merge([one, two], whole).trials) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trials": POINTS[:3]}, "they differ in trials"),
        ({"data_fingerprint": "other"}, "they differ in data_fingerprint"),
        ({"tune": {"metric": "eval_loss", "mode": "max"}}, "they differ in tune.mode"),
        ({"config": {"learning_rate": 0.2, "lora_r": 1}}, "learning_rate \\(0.1 and 0.2\\)"),
        ({"shard": [1, 2]}, "both have trial 0; name each part once"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    one, two = write_part(tmp_path / "one", (1, 2)), write_part(tmp_path / "two", (2, 2), **change)
    with pytest.raises(ConfigError, match=says):
        merge([one, two], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_other_folders_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_part(tmp_path / "one", (1, 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "sweep.json").write_text(json.dumps(FACTS)[:-9])
    for words, says in (
        ([str(tmp_path / "nothing")], "there is no sweep"),
        ([str(tmp_path / "torn")], "is damaged"),
        ([str(one), "--output", str(tmp_path / "full")], "is not empty; name another folder"),
    ):
        assert main(["merge", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line


def test_populations_of_parts_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_part(tmp_path / "one", (1, 2)), write_part(tmp_path / "two", (2, 2))
    SweepDir(one).write_population(Population(3, (Change(1, 10, 2, 0, {"lora_r": 64}),)))
    SweepDir(two).write_population(Population(2, (Change(2, 20, 3, 1, {"lora_r": 128}),)))
    result = merge([one, two], tmp_path / "whole")
    assert {trial.number: trial.params["lora_r"] for trial in result.trials if trial.number > 1} == {
        2: 64,
        3: 128,
    }
    assert SweepDir(result.path).read_population().generations == 3
    assert result.best is not None and result.best.number == 2
    assert yaml.safe_load((result.path / "best" / "config.yaml").read_text())["lora_r"] == 64
    assert main(["merge", str(one), str(two), "--output", str(tmp_path / "again")]) == 0
    assert "trial 2: eval_loss 2.0000 with lora_r=64" in capsys.readouterr().out


def test_a_folder_is_named_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(tmp_path / "one", (1, 1))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "one", "--output", "joined"]) == 0
    assert "<h1>Sweep joined" in (tmp_path / "joined" / "report.html").read_text()
    monkeypatch.chdir(tmp_path / "joined")
    assert SweepDir(".").name == "joined" and report.main(["."]) == 0
