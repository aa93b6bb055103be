"""A sweep's directory in an object store: what one machine leaves there, another finds."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray.errors import ConfigError
from nemo_ray.run_dir import STATE_NAME
from nemo_ray.stored_run import StoredRunDir
from nemo_ray.tune import read_result, runner
from nemo_ray.tune.course import Course
from nemo_ray.tune.report import write_report
from nemo_ray.tune.setup import check_free
from nemo_ray.tune.source import Known
from nemo_ray.tune.stored_sweep import StoredSweepDir, open_sweep
from nemo_ray.tune.sweep_dir import Change, Population, SweepDir, TrialEnd
from nemo_ray.tune.trial import DRIVER_CPUS
from nemo_ray.view import report, status
from tests.object_store import ObjectStore, use

URL = "s3://sweeps/mine"
POINTS = [{"lora_r": 4}, {"lora_r": 8}, {"lora_r": 16}]
FACTS = {"tune": {"metric": "eval_loss", "mode": "min"}, "trials": POINTS, "config": {"lora_r": 1}, "best": 1}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    with ObjectStore() as made:
        use(made, monkeypatch)
        made.create_bucket("sweeps")
        yield made


@pytest.fixture
def elsewhere(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SweepDir:
    """A sweep of three, two of which ended and one of which never began, as another machine sees it."""
    folder = StoredSweepDir(URL)
    folder.pull(range(3))
    assert not folder.holds_sweep() and not folder.foreign_entries()
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(FACTS)
    for number in (0, 1):
        run = folder.trial(number)
        run.path.mkdir(parents=True)
        run.write_run({"config": {}})
        for step in (2, 4):
            run.append_metrics({"step": step, "loss": 5.0})
            run.append_metrics({"step": step, "eval_loss": 4.0 - number - step / 10})
        run.flush_metrics()
        checkpoint(store, folder, number, 4, f"weights of {number}")
        store.put(
            "sweeps", f"mine/trials/00{number}/adapter/adapter_model.safetensors", b"best" * (number + 1)
        )
        store.put("sweeps", f"mine/trials/00{number}/adapter/adapter_config.json", b"{}")
        run.push()
    folder.write_end(TrialEnd(1, "finished", 2, 2.6, 4))
    folder.write_population(Population(1, (Change(1, 2, 0, 1, {"lora_r": 9}),)))
    write_report(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    found = open_sweep(URL)
    found.pull(range(3))
    return found


def checkpoint(store: ObjectStore, folder: SweepDir, number: int, step: int, weights: str) -> None:
    key = f"mine/trials/00{number}/checkpoints/step-{step}"
    store.put("sweeps", f"{key}/0-{number}.distcp", weights.encode())
    store.put("sweeps", f"{key}/{STATE_NAME}", json.dumps({"step": step}).encode())
    local = folder.trial(number).checkpoint_dir(step)
    local.mkdir(parents=True)
    (local / STATE_NAME).write_text(json.dumps({"step": step}))


def test_another_machine_finds_all_of_it(elsewhere: SweepDir, store: ObjectStore) -> None:
    assert elsewhere.holds_sweep() and elsewhere.read() == FACTS and elsewhere.place == URL
    assert elsewhere.name == "mine" and elsewhere.trial_place(1) == f"{URL}/trials/001"
    assert [elsewhere.read_end(n) is not None for n in range(3)] == [False, True, False]
    assert elsewhere.read_population().generations == 1
    run = elsewhere.trial(0)
    assert isinstance(run, StoredRunDir) and run.checkpoint_steps() == [4]
    assert [row["step"] for row in run.read_metrics()] == [2, 2, 4, 4]
    assert not elsewhere.trial(2).has_results()
    assert b"trial 1" in store.objects("sweeps")["mine/report.html"]


def test_trials_are_read_beside_each_other(elsewhere: SweepDir, monkeypatch: pytest.MonkeyPatch) -> None:
    together, pull = threading.Barrier(2, timeout=20), StoredRunDir.pull

    def meet(run: StoredRunDir) -> None:
        together.wait()
        pull(run)

    monkeypatch.setattr(StoredRunDir, "pull", meet)
    elsewhere.pull()
    assert elsewhere.read_end(1) is not None


def test_what_an_earlier_sweep_left_on_the_machine_is_gone(
    elsewhere: SweepDir, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere.clear()
    assert not elsewhere.trial(0).read_metrics() and elsewhere.read_end(1) is None, "it may be replaced here"
    left = store.objects("sweeps")
    assert not [key for key in left if "trials" in key or key.endswith(("sweep.json", ".html", "tion.json"))]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    again = StoredSweepDir(URL)
    assert again.trial(0).read_metrics(), "of the sweep that was"
    again.pull(range(3))
    check_free(again, overwrite=False)
    assert not again.trial(0).read_metrics() and not again.holds_sweep()
    store.put("sweeps", "mine/thesis.tex", b"")
    again.pull(range(3))
    with pytest.raises(ConfigError, match=f"{URL} is not the folder of a sweep .it holds thesis.tex"):
        check_free(again, overwrite=True)


def test_checkpoints_are_copied_and_dropped_in_the_store(elsewhere: SweepDir, store: ObjectStore) -> None:
    elsewhere.copy_checkpoint(1, 0, 4)
    taken = {k: v for k, v in store.objects("sweeps").items() if k.startswith("mine/trials/000/checkpoints")}
    place = "mine/trials/000/checkpoints/step-4"
    assert taken.keys() == {f"{place}/0-1.distcp", f"{place}/{STATE_NAME}"}
    assert taken[f"{place}/0-1.distcp"] == b"weights of 1"
    again = open_sweep(URL)
    assert again.trial(0).checkpoint_steps() == [4], "on the driver's node, too"
    again.drop_checkpoints(0)
    assert not [key for key in store.objects("sweeps") if key.startswith("mine/trials/000/checkpoints")]
    assert not again.trial(0).checkpoint_steps() and again.trial(1).checkpoint_steps() == [4]


def test_the_best_result_is_there_and_here(elsewhere: SweepDir, store: ObjectStore) -> None:
    store.put("sweeps", "mine/best/old", b"of a start before")
    best = elsewhere.publish_best(1, {"lora_r": 8})
    kept = {k.removeprefix("mine/best/"): v for k, v in store.objects("sweeps").items() if "/best/" in k}
    assert kept.keys() == {"adapter_model.safetensors", "adapter_config.json", "config.yaml"}
    assert kept["adapter_model.safetensors"] == b"bestbest" and kept["config.yaml"] == b"lora_r: 8\n"
    assert (best / "adapter_model.safetensors").read_bytes() == b"bestbest"
    assert elsewhere.shown(best) == f"{URL}/best"


def test_it_is_looked_at_from_anywhere(
    elsewhere: SweepDir, store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([URL]) == 0
    assert f"sweep {URL}: running or broken off, 1 of 3 trials have ended" in capsys.readouterr().out
    kept = store.objects("sweeps")["mine/report.html"]
    store.fail_always("403", method="PUT")  # somebody who may only read
    assert report.main([URL, "--output", str(tmp_path / "page.html")]) == 0
    store.fail_always(None)
    assert store.objects("sweeps")["mine/report.html"] == kept
    assert "trial 1" in (tmp_path / "page.html").read_text()
    elsewhere.publish_best(1, {})
    result = read_result(URL)
    assert (result.path / "best" / "adapter_model.safetensors").read_bytes() == b"bestbest"
    assert result.best is not None and result.best.number == 1 and result.best.value == 2.6
    with pytest.raises(FileNotFoundError):
        read_result("s3://sweeps/none")


def test_a_store_that_is_away_as_a_trial_ends_ends_no_sweep(elsewhere: SweepDir, store: ObjectStore) -> None:
    store.fail_always("403", method="PUT")
    end = TrialEnd(0, "finished", 2, 3.6, 4)
    elsewhere.write_end(end)
    store.fail_always(None)
    assert elsewhere.read_end(0) == end and "mine/trials/000/trial.json" not in store.objects("sweeps")
    elsewhere.write_end(end)  # again, at the sweep's end
    assert "mine/trials/000/trial.json" in store.objects("sweeps")
    (elsewhere.trial(0).path / "trial.json").write_text("")  # its process makes its folder anew
    assert elsewhere.read_end(0) is None


def test_trials_of_a_sweep_in_a_store_are_on_the_drivers_node_that_may_have_no_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, float]] = []

    def noted(trainable: object, resources: dict[str, float]) -> object:
        asked.append(resources)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.tune, "with_resources", noted)
    monkeypatch.setattr(runner.session, "on_this_node", lambda: {"node:10.0.0.1": 0.001})
    for folder in (StoredSweepDir(URL), SweepDir(tmp_path)):
        with pytest.raises(KeyboardInterrupt):
            runner.fit(Course(folder, [0], "eval_loss", "min", "none"), None, Known([]), 1)
    assert asked == [{"node:10.0.0.1": 0.001}, {"CPU": DRIVER_CPUS}]
