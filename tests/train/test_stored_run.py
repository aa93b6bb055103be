"""A run in an object store, without Ray: the actor's methods are called in this process."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemo_ray.errors import ConfigError, SupersededError
from nemo_ray.export import __main__ as export
from nemo_ray.model import prompt
from nemo_ray.run_dir import RunDir
from nemo_ray.storage import exists, list_files, publish_json, read_bytes
from nemo_ray.stored_run import StoredRunDir, fetch_result, open_run, working_folder
from nemo_ray.train import driver as drivers
from nemo_ray.train import run_service
from nemo_ray.train.driver import this_driver
from nemo_ray.train.driver_lock import FILE_NAME
from nemo_ray.train.remote_run import RemoteRunDir
from nemo_ray.train.run_service import RunService
from nemo_ray.train.watchdog import Watchdog
from nemo_ray.train.worker import WorkerSpec, watched
from tests.e2e.compare import assert_same_course, assert_same_tensors
from tests.group import group_of_one
from tests.object_store import ObjectStore
from tests.train.runs import CPU, KilledError, Runs
from tests.train.tracker_readers import tensorboard_points, tensorboard_texts


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as made:
        made.create_bucket("runs")
        yield made


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    """With its address in the environment, and a cache folder of this test's own."""
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    on_machine("one", monkeypatch, tmp_path)
    return server


def on_machine(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on this process is on another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://runs/{request.node.name}"


def hold(url: str, driver: drivers.Driver) -> None:
    """As StoreLock does it."""
    publish_json(f"{url}/{FILE_NAME}", {**asdict(driver), "beats": 1})


class Driver:
    """What a driver does before its workers start."""

    def __init__(self, url: str) -> None:
        self.url, self.me = url, this_driver(None)
        hold(url, self.me)
        self.run = StoredRunDir(url)
        self.run.pull()
        self.service = RunService(url, self.me)

    def worker(self) -> RemoteRunDir:
        """A start of the workers."""
        run = RemoteRunDir(self.url, lambda name, *arguments: getattr(self.service, name)(*arguments))
        run.begin_attempt()
        return run


def seen_from(machine: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StoredRunDir:
    """The run as another machine finds it."""
    on_machine(machine, monkeypatch, tmp_path)
    run = StoredRunDir(url)
    run.pull()
    return run


# -- what lies where ------------------------------------------------------------------------------


def test_a_path_or_a_url(tmp_path: Path) -> None:
    assert type(open_run(str(tmp_path))) is RunDir and open_run(str(tmp_path)).place == str(tmp_path)
    run = open_run("s3://bucket/a/run/")
    assert isinstance(run, StoredRunDir) and run.place == "s3://bucket/a/run"
    assert run.shown(run.adapter_dir) == "s3://bucket/a/run/adapter"
    others = {working_folder(url) for url in ("s3://bucket/b/run", "gs://bucket/a/run", "s3://bucket/a/run")}
    assert len(others) == 3 and run.path in others
    assert all(folder.name.startswith("run-") for folder in others)


def test_what_a_driver_writes_is_found_on_another_machine(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Driver(url).run
    run.write_run({"step": 1})
    run.append_metrics({"step": 1, "loss": 2.0})
    run.push()
    run.update_run({"outcome": "failed"})
    run.append_metrics({"step": 2, "loss": 1.0})
    run.push()
    with store.recorded() as requests:
        run.push()
    own = url.partition("//")[2]  # what earlier tests began may push meanwhile
    assert any(own in request.path for request in store.requests)
    later = [request.path for request in requests if own in request.path]
    assert not any(name in path for path in later for name in ("run.json", "metrics.jsonl"))  # as they were
    other = seen_from("two", url, monkeypatch, tmp_path)
    assert other.path != run.path
    assert other.read_run() == {"step": 1, "outcome": "failed"}
    assert [row["step"] for row in other.read_metrics()] == [1, 2]
    assert other.holds_run() and other.has_results() and other.foreign_entries() == []


def test_foreign_objects_are_seen_and_never_touched(store: ObjectStore, url: str) -> None:
    publish_json(f"{url}/notes.txt", "mine")
    publish_json(f"{url}/photos/cat.png", "mine")
    run = Driver(url).run
    assert run.foreign_entries() == ["notes.txt", "photos"]
    assert not run.holds_run() and not run.has_results()
    run.write_run({})
    run.push()
    run.clear()
    assert not exists(f"{url}/run.json")
    assert read_bytes(f"{url}/notes.txt") == read_bytes(f"{url}/photos/cat.png") == b'"mine"\n'


# -- who may write --------------------------------------------------------------------------------

WRITES: dict[str, Callable[[RunDir], Any]] = {
    "metrics": lambda run: run.append_metrics({"step": 9}),
    "run": lambda run: run.update_run({"step": 9}),
    "progress": lambda run: run.write_progress({"step": 9}),
    "truncate": lambda run: run.truncate_metrics(0),
    "completion": lambda run: run.append_completion({"step": 9}),
    "nonfinite": lambda run: run.write_nonfinite(9, 0, {}, keep=3),
    "profile": lambda run: run.write_profile(b"trace", {"steps": 9}),
    "checkpoint": lambda run: run.publish_checkpoint(9, {}),
    "remove": lambda run: run.remove_checkpoint(1),
    "retire": lambda run: run.retire_checkpoint(1, "damaged"),
    "result": lambda run: run.publish_result(run.adapter_dir),
    "trackers": lambda run: run.write_trackers({"wandb_run_id": "9"}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_older_start_writes_nothing_any_more(
    store: ObjectStore, url: str, write: Callable[[RunDir], Any]
) -> None:
    driver = Driver(url)
    driver.run.write_run({})
    old = driver.worker()
    old.publish_checkpoint(1, {"step": 1})
    old.append_metrics({"step": 1})
    old.result_aside(old.adapter_dir).mkdir(parents=True)
    (old.result_aside(old.adapter_dir) / "adapter_config.json").write_text("old")
    driver.worker()
    driver.run.push()
    local = {path: path.read_bytes() for path in driver.run.path.rglob("*") if path.is_file()}
    stored = {file: read_bytes(file) for file in list_files(url)}
    with pytest.raises(SupersededError, match="a newer start of this run took over"):
        write(old)
    driver.run.push()
    assert {path: path.read_bytes() for path in driver.run.path.rglob("*") if path.is_file()} == local
    now = {file: read_bytes(file) for file in list_files(url) if "/adapter/" not in file}
    assert now == {file: data for file, data in stored.items() if "/adapter/" not in file}


def test_an_actor_that_ray_started_again_serves_the_same_start(store: ObjectStore, url: str) -> None:
    driver = Driver(url)
    worker = driver.worker()
    worker.append_metrics({"step": 1})
    driver.service = RunService(url, driver.me)
    worker.append_metrics({"step": 2})
    worker.publish_checkpoint(2, {"step": 2})
    assert [row["step"] for row in driver.run.read_metrics()] == [1, 2]
    assert driver.run.checkpoint_steps() == worker.checkpoint_steps() == [2]


def test_a_driver_that_was_replaced_publishes_nothing(store: ObjectStore, url: str) -> None:
    driver = Driver(url)
    worker = driver.worker()
    hold(url, this_driver(None))
    with pytest.raises(SupersededError, match="another driver took the run over"):
        worker.publish_checkpoint(1, {"step": 1})
    assert not list_files(f"{url}/checkpoints")


def test_rows_reach_the_store_between_checkpoints(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_service, "PUSH_EVERY_S", 0.1)
    worker = Driver(url).worker()
    worker.append_metrics({"step": 1})
    end = time.monotonic() + 20
    while not exists(f"{url}/metrics.jsonl"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_damaged_checkpoint_is_put_aside_and_kept(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = Driver(url)
    worker = driver.worker()
    worker.publish_checkpoint(1, {"step": 1})
    worker.publish_checkpoint(2, {"step": 2})
    name = worker.retire_checkpoint(2, "damaged")
    assert read_bytes(name).strip() == b'{\n  "step": 2\n}'
    assert worker.checkpoint_steps() == driver.run.checkpoint_steps() == [1]
    assert seen_from("two", url, monkeypatch, tmp_path).checkpoint_steps() == [1]


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def reference(runs: Runs) -> RunDir:
    return runs.run("reference", save_steps=2, save_total_limit=2)


def train(driver: Driver, runs: Runs, die_at_evaluation: int | None = None, **changes: Any) -> None:
    """The worker's code over the run of `driver`."""
    spec = runs.spec("settings", save_steps=2, save_total_limit=2, **changes)
    if not driver.run.holds_run():
        driver.run.write_run({})
    run = RemoteRunDir(driver.url, lambda name, *arguments: getattr(driver.service, name)(*arguments))

    def report(figures: Mapping[str, Any]) -> None:
        if figures["step"] == die_at_evaluation:
            end = time.monotonic() + 60
            while die_at_evaluation - 2 not in run.checkpoint_steps():
                assert time.monotonic() < end
                time.sleep(0.01)
            raise KilledError

    with group_of_one(), Watchdog(run.rank_file(0), 0, 0) as watchdog:
        watched(WorkerSpec(spec.config, spec.plan, driver.url), run, CPU, report, watchdog, lambda: False)
    driver.run.push()


def download(run: StoredRunDir) -> None:
    """What a run in a store keeps there only."""
    for file in list_files(f"{run.url}/adapter") + list_files(f"{run.url}/tensorboard"):
        place = run.path / file.removeprefix(f"{run.url}/")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(read_bytes(file))


def test_a_run_that_died_goes_on_elsewhere_from_a_store_that_fails_now_and_then(
    store: ObjectStore,
    url: str,
    runs: Runs,
    reference: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    store.fail_some(0.05, seed=3, faults=("500", "503", "reset"))
    try:
        with pytest.raises(KilledError):
            train(Driver(url), runs, die_at_evaluation=4)
        on_machine("two", monkeypatch, tmp_path)
        driver = Driver(url)
        assert driver.run.checkpoint_steps() == [2]
        train(driver, runs, resume_from_checkpoint="auto")
    finally:
        store.fail_some(0, seed=0)
    run = seen_from("three", url, monkeypatch, tmp_path)
    download(run)
    assert_same_course(run, reference, rtol=1e-6)
    name = "adapter_model.safetensors"
    assert_same_tensors(run.adapter_dir / name, reference.adapter_dir / name, tolerance=1e-6)
    assert run.checkpoint_steps() == [4, 6]
    folders = {file.split("/")[-2] for file in list_files(f"{url}/checkpoints")}
    assert folders == {"step-4", "step-6"}
    points = tensorboard_points(run.tensorboard_dir)
    assert {step for name, step in points if name == "train/loss"} == set(range(1, 7))
    assert all(len(values) == 1 for values in points.values())
    assert len(tensorboard_texts(run.tensorboard_dir)) == 1
    for command in (prompt.find_source(None, url), export.find_source(url, None)):
        assert command.adapter is not None
        assert (command.adapter / name).read_bytes() == (run.adapter_dir / name).read_bytes()
        assert command.base == str(runs.base)
    assert export.find_source(f"{url}/adapter", None).adapter == Path(fetch_result(f"{url}/adapter", "it"))


def test_where_there_is_no_result_it_is_said(store: ObjectStore, url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--adapter: s3://.* holds no adapter and no model: it is"):
        prompt.find_source(None, url)
    Driver(url).run.write_run({})
    StoredRunDir(url).push()
    with pytest.raises(ConfigError, match=r"^RUN_OR_ADAPTER: s3://.*: its run has not ended yet"):
        export.find_source(url, None)
