"""The pipeline through Ray Data, and the command. One local Ray for all of it."""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_ray import session
from nemo_ray.data import sources
from nemo_ray.data.__main__ import main
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.order import window_order
from nemo_ray.data.pack_counts import read_counts
from nemo_ray.data.prepare import WindowTask
from nemo_ray.data.reader import PackReader
from nemo_ray.data.review import Prepared
from nemo_ray.data.shards import read_stats
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics
from nemo_ray.errors import DataError
from nemo_ray.storage import exists, read_bytes, remove
from tests.data.helpers import chats, prepare_all, section, write_lines


def write_config(tmp_path: Path, base: Path, **keys: object) -> Path:
    path = tmp_path / "config.yaml"
    values = {
        "base_model": str(base),
        "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}],
        "sequence_len": 128,
        "output_dir": str(tmp_path / "out"),
        **keys,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_show_prints_trained_tokens_and_their_share_without_ray(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "quick"}]},
        {"messages": [{"role": "user", "content": "a fox"}]},
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    config = write_config(tmp_path, base)
    assert main([str(config), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "the fox<|im_end|>" in out and "«quick<|im_end|>»" in out
    assert "tokens, 2 trained (" in out and "rejected: no assistant turn" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.html"]


def test_mistakes_are_one_line_and_an_exit_code(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "x"}] * 4)
    config = write_config(tmp_path, base)
    assert main([str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: datasets[0].field_messages: no row of ")
    write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 4)
    assert main([str(config)]) == 1
    assert "no assistant turn" in capsys.readouterr().err


# -- through Ray ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    environment = session.Environment()
    environment.add({"RAY_AUTH_MODE": "disabled"})  # Ray is used from this process by other tests too
    session.start_local(2, environment)
    yield
    session.shutdown()
    environment.restore()


@pytest.fixture
def terminal(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What Ray Data prints."""
    import ray.data  # noqa: F401

    (handler,) = (one for one in logging.getLogger("ray.data").handlers if one.name == "console")
    printed = io.StringIO()
    monkeypatch.setattr(handler, "stream", printed)
    return printed


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_shards_from_ray_are_those_made_here(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    from nemo_ray.data.pipeline import prepare

    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    data = section(write_lines(tmp_path / "rows.jsonl", chats(500, words=6)), val_set_size=0.1)
    plan = plan_data(data, str(base), str(tmp_path / "ray"))
    here = plan_data(data, str(base), str(tmp_path / "here"))
    prepare_all(here, data, base)

    ready: list[Prepared] = []
    driver = threading.Thread(
        target=prepare,
        args=(plan, data, str(base)),
        kwargs={"order": window_order(plan, 0), "num_cpus": 0.9, "progress": ready.append},
    )
    driver.start()
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=4, timeout_s=60)
    rows = 0
    while (step := reader.next_step()) is not None:
        rows += sum(len(pack.sample_rows) for pack in step.packs)
    driver.join()
    count = len(plan.windows) + len(plan.eval_windows)
    assert count > 5
    assert [(now.windows, now.num_windows) for now in ready] == [(n + 1, count) for n in range(count)]
    assert (ready[-1].new_rows, ready[-1].rows_left) == (500, 0)
    assert rows == data_statistics(plan)["train"]["documents"] > 100
    made = [read_stats(plan.shard_path(window)).packs for window in (*plan.windows, *plan.eval_windows)]
    assert read_counts(plan).tolist() == made
    for window in (*plan.windows, *plan.eval_windows):
        assert read_bytes(plan.shard_path(window)) == read_bytes(here.shard_path(window))

    # A second run makes only what is missing.
    changed = {path.name: path.stat().st_mtime_ns for path in Path(plan.directory).glob("*.arrow")}
    remove(plan.shard_path(plan.windows[0]))
    prepare(plan, data, str(base))
    again = {path.name: path.stat().st_mtime_ns for path in Path(plan.directory).glob("*.arrow")}
    assert {name for name in changed if changed[name] != again[name]} == {f"{plan.windows[0].key}.arrow"}

    # A stop ends it early.
    for window in plan.windows:
        remove(plan.shard_path(window))
    stop = threading.Event()
    stop.set()
    prepare(plan, data, str(base), stop=stop)
    assert sum(exists(plan.shard_path(window)) for window in plan.windows) < len(plan.windows)


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_bad_rows_are_listed_and_too_many_of_them_stop_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    from nemo_ray.data.pipeline import prepare

    monkeypatch.setattr(sources, "PACKS_PER_WINDOW", 16)
    rows = chats(300, words=6)
    rows[120] = {"other": 1}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = section(path)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    prepare(plan, data, str(base))
    listed = [json.loads(line) for line in read_bytes(plan.rejected_path).splitlines()]
    assert listed == [{"file": str(path), "row": 120, "reason": "no field 'messages'", "detail": ""}]

    rows[200:230] = [{"messages": [{"role": "user", "content": "x"}]}] * 30
    data = section(write_lines(tmp_path / "bad.jsonl", rows))
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    with pytest.raises(DataError, match=r"no assistant turn \(.*bad.jsonl row 200, "):
        prepare(plan, data, str(base))
    reader = PackReader(plan, seed=0, num_epochs=9, rank=0, world_size=1, packs_per_step=64)
    missing = DataPlan.from_json({**plan.to_json(), "directory": str(tmp_path / "none")})
    assert exists(plan.failure_path) and reader.next_step() is not None
    assert not exists(missing.failure_path)


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_a_failing_task_is_one_line_for_pipeline_and_readers(
    base: Path, tmp_path: Path, local_ray: None
) -> None:
    from nemo_ray.data.pipeline import prepare

    path = write_lines(tmp_path / "rows.jsonl", chats(50))
    data = section(path)
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    path.write_text("")
    with pytest.raises(DataError, match="rows.jsonl has changed since this run's data was planned"):
        prepare(plan, data, str(base))
    reader = PackReader(plan, seed=0, num_epochs=1, rank=0, world_size=1, packs_per_step=1)
    with pytest.raises(DataError, match="rows.jsonl has changed since"):
        reader.next_step()
    write_lines(path, chats(50))
    prepare(plan, data, str(base))
    assert not exists(plan.failure_path) and read_stats(plan.shard_path(plan.windows[0])).documents


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_an_unforeseen_error_of_a_task_is_named(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: io.StringIO,
    local_ray: None,
) -> None:
    from nemo_ray.data import pipeline

    def fail(task: WindowTask) -> dict[str, object]:
        raise MemoryError from KeyError("x")

    monkeypatch.setattr(pipeline, "prepare_task", fail)
    data = section(write_lines(tmp_path / "rows.jsonl", chats(50)))
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    with pytest.raises(DataError) as caught:
        pipeline.prepare(plan, data, str(base))
    assert str(caught.value) == "preparing the data failed: MemoryError"
    (note,) = caught.value.__notes__
    assert "KeyError: 'x'" in note and "in fail" in note
    assert terminal.getvalue() == ""


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_errors_that_ray_data_logs_are_in_its_file(
    base: Path, tmp_path: Path, terminal: io.StringIO, local_ray: None
) -> None:
    from ray.data._internal.logging import get_log_directory

    from nemo_ray.data.pipeline import prepare

    log = logging.getLogger("ray.data.exceptions")
    for number, printed in enumerate((False, True, False)):
        logging.getLogger("ray").setLevel(logging.INFO if printed else logging.ERROR)  # as by --verbose
        data = section(write_lines(tmp_path / "rows.jsonl", chats(20, seed=number)))
        prepare(plan_data(data, str(base), str(tmp_path / "prepared")), data, str(base))
        log.error("error %d", number)
        log.warning("warning %d", number)
        shown = terminal.getvalue()
        assert (f"error {number}" in shown) == printed and f"warning {number}" in shown
    written = Path(get_log_directory() or "", "ray-data.log").read_text()
    assert all(f"error {number}" in written for number in range(3))


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_data_tasks_do_not_load_torch(local_ray: None) -> None:
    import ray

    def loaded(row: dict[str, int]) -> dict[str, bool]:
        import nemo_ray.data.prepare  # noqa: F401

        return {"torch": "torch" in sys.modules}

    assert ray.data.range(1).map(loaded).take_all() == [{"torch": False}]
