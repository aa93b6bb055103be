"""An older start of a run's workers publishes nothing, at whatever moment a newer one begins."""

import pickle
import tempfile
import threading
from pathlib import Path

import pytest

from nemo_ray.attempts import Attempt
from nemo_ray.errors import SupersededError
from nemo_ray.run_dir import RunDir


def started(path: Path) -> RunDir:
    run = RunDir(path)
    run.begin_attempt()
    return run


def write_folder(attempt: Attempt, name: str, text: str) -> None:
    folder = attempt.aside(attempt.places[0] / name)
    folder.mkdir()
    (folder / "file").write_text(text)


def test_numbers_rise_over_ends_and_restarts(tmp_path: Path) -> None:
    assert [Attempt.begin([tmp_path]).number for _ in range(3)] == [1, 2, 3]
    (only,) = (tmp_path / ".attempts").iterdir()
    assert only.name.startswith("3-")


def test_of_starts_at_the_same_moment_one_survives(tmp_path: Path) -> None:
    places = [tmp_path / "run", tmp_path / "checkpoints"]
    found: list[Attempt] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        found.append(Attempt.begin(places))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({attempt.name for attempt in found}) == 8
    newest = max(found, key=lambda attempt: (attempt.number, attempt.name))
    newest.check()
    for attempt in found:
        if attempt is not newest:
            with pytest.raises(SupersededError, match=f"attempt {attempt.number} writes nothing"):
                attempt.check()


def test_what_was_written_aside_before_a_newer_start_gets_no_name(tmp_path: Path) -> None:
    old = Attempt.begin([tmp_path])
    write_folder(old, "step-4", "old")
    new = Attempt.begin([tmp_path])
    with pytest.raises(SupersededError):
        old.publish(tmp_path / "step-4")
    assert not (tmp_path / "step-4").exists()
    with pytest.raises(FileNotFoundError):
        old.aside(tmp_path / "step-8").mkdir()
    write_folder(new, "step-4", "new")
    new.publish(tmp_path / "step-4")
    assert (tmp_path / "step-4" / "file").read_text() == "new"


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path) -> None:
    old = Attempt.begin([tmp_path])
    write_folder(old, "adapter", "first")
    old.publish(tmp_path / "adapter")
    Attempt.begin([tmp_path])
    with pytest.raises(SupersededError):
        old.publish(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "file").read_text() == "first"


def test_an_older_start_appends_its_rows_to_nowhere(tmp_path: Path) -> None:
    old = started(tmp_path)
    old.truncate_metrics(0)
    old.append_metrics({"step": 1, "loss": 3.0})
    old.append_metrics({"step": 2, "loss": 2.0})
    new = started(tmp_path)
    old.append_metrics({"step": 3, "loss": 1.0})  # until its rows are taken over it may still add some
    new.truncate_metrics(1)
    for step in (3, 4):
        old.append_metrics({"step": step, "loss": 9.0})
    new.append_metrics({"step": 2, "loss": 2.5})
    assert [(row["step"], row["loss"]) for row in new.read_metrics()] == [(1, 3.0), (2, 2.5)]
    with pytest.raises(SupersededError):
        old.truncate_metrics(0)  # the rows are the newer one's
    assert len(new.read_metrics()) == 2


def test_an_older_start_says_nothing_any_more(tmp_path: Path) -> None:
    old = started(tmp_path)
    old.write_run({})
    old.write_progress({"phase": "training", "step": 7})
    new = started(tmp_path)
    new.write_progress({"phase": "loading"})
    for write in (
        lambda: old.write_progress({"phase": "training", "step": 8}),
        lambda: old.update_run({"model": {}}),
        lambda: old.append_completion({"prompt": "a", "completion": "b", "stage": "after", "step": 9}),
    ):
        with pytest.raises(SupersededError):
            write()
    assert new.read_progress() == {"phase": "loading"}
    assert new.read_run() == {} and new.read_completions() == []


def test_workers_that_join_write_as_one(tmp_path: Path) -> None:
    first, second = started(tmp_path), RunDir(tmp_path)
    second.attempt = pickle.loads(pickle.dumps(first.attempt))
    second.own_attempt.check()
    started(tmp_path)
    with pytest.raises(SupersededError):
        second.own_attempt.check()


def test_checkpoints_behind_a_link_to_another_file_system(tmp_path: Path) -> None:
    run, shared_memory = RunDir(tmp_path / "run"), Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as other:
        run.path.mkdir()
        run.checkpoints_dir.symlink_to(other)
        old, new = started(run.path), started(run.path)
        final = run.checkpoint_dir(4)
        new.own_attempt.aside(final).mkdir()
        new.own_attempt.publish(final)
        assert final.is_dir()
        with pytest.raises(FileNotFoundError):
            old.own_attempt.aside(run.checkpoint_dir(8)).mkdir()
