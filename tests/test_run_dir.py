"""The run directory: what other tools and a resumed run rely on."""

import json
from pathlib import Path

import pytest

from nemo_ray.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def complete(run: RunDir, step: int) -> Path:
    folder = run.checkpoint_dir(step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    return folder


def test_creating_it_touches_nothing(run: RunDir) -> None:
    assert not run.path.exists()
    assert not run.holds_run() and not run.has_results() and not run.has_trained()
    assert run.newest_checkpoint() is None and run.read_metrics() == [] and run.read_progress() == {}
    assert run.foreign_entries() == []


def test_metrics_are_appended_and_cut_back_to_a_step(run: RunDir) -> None:
    rows = [{"step": 0, "eval_loss": 2.0}, *({"step": step, "loss": 1.0 / step} for step in range(1, 6))]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == rows
    run.truncate_metrics(3)
    assert run.read_metrics() == rows[:4]
    run.append_metrics(rows[4])
    assert run.read_metrics() == rows[:5]


def test_a_line_cut_short_by_a_kill_is_left_out_and_then_removed(run: RunDir) -> None:
    run.append_metrics({"step": 1, "loss": 1.0})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1, "loss": 1.0}]
    run.truncate_metrics(10)
    run.append_metrics({"step": 2, "loss": 0.5})
    assert [row["step"] for row in run.read_metrics()] == [1, 2]


def test_the_newest_checkpoint_is_the_complete_one_with_the_highest_step(run: RunDir) -> None:
    for step in (9, 100, 20):
        complete(run, step)
    run.checkpoint_dir(200).mkdir()
    (run.checkpoints_dir / ".step-300.partial").mkdir()
    (run.checkpoints_dir / "step-400.superseded-x").mkdir()
    assert run.newest_checkpoint() == run.checkpoint_dir(100)
    assert [path.name for path in run.complete_checkpoints()] == ["step-9", "step-20", "step-100"]


def test_run_json_is_written_whole_and_merged(run: RunDir) -> None:
    run.write_run({"world_size": 2, "config": {"seed": 1}})
    run.update_run({"model": {"total": 3}})
    assert json.loads(run.run_json.read_text()) == {
        "world_size": 2,
        "config": {"seed": 1},
        "model": {"total": 3},
    }
    assert run.holds_run() and not run.has_results()


def test_clear_takes_the_run_and_nothing_else(run: RunDir) -> None:
    run.write_run({})
    run.append_metrics({"step": 1})
    run.append_completion({"prompt": "a", "completion": "b", "stage": "before", "step": 0})
    complete(run, 5)
    run.adapter_dir.mkdir()
    run.write_progress({"phase": "training"})
    run.write_nonfinite(5, 0, {"step": 5}, keep=1)
    run.write_profile(b"trace", {"steps": 1})
    run.request_stop()
    run.prepared_dir.mkdir()
    (run.prepared_dir / "k.arrow").write_text("rows")
    (run.path / "notes.txt").write_text("mine")
    (run.path / "train.log").write_text("output")
    assert run.foreign_entries() == ["notes.txt"]
    run.clear()
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt", "prepared", "train.log"]
    assert (run.prepared_dir / "k.arrow").exists()


def test_clear_unlinks_a_linked_folder_and_spares_its_target(run: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("kept")
    run.path.mkdir()
    run.checkpoints_dir.symlink_to(target)
    run.clear()
    assert not run.checkpoints_dir.exists() and (target / "file").exists()


@pytest.mark.parametrize(("rows", "trained"), [([], False), ([0], False), ([0, 1], True)])
def test_a_run_that_only_evaluated_has_not_trained(run: RunDir, rows: list[int], trained: bool) -> None:
    for step in rows:
        run.append_metrics({"step": step})
    assert run.has_trained() is trained


def test_stop_and_progress_are_forgotten_before_a_new_start(run: RunDir) -> None:
    run.path.mkdir()
    run.write_progress({"phase": "training", "step": 3})
    assert run.read_progress() == {"phase": "training", "step": 3}
    assert not run.stop_requested()
    run.request_stop()
    assert run.stop_requested()
    run.clear_stop()
    assert not run.stop_requested() and run.read_progress() == {}
    assert list(run.path.iterdir()) == []


def test_a_page_looked_at_before_the_run_is_the_runs_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    for path in (run.data_page, run.rejected_file):
        path.write_text("x")
    assert run.foreign_entries() == [] and not run.has_results()
    run.clear()
    assert run.data_page.exists() and not run.rejected_file.exists()
