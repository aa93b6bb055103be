"""The driver without Ray: paths, refusals, resources, messages and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_ray import failures, session
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config, RaySection
from nemo_ray.data.manifest import DataPlan, FileInfo, SourceInfo
from nemo_ray.data.window_list import Span, Window, WindowList
from nemo_ray.errors import ClusterError, ConfigError, DataError, PatchError, StorageError
from nemo_ray.run_dir import RunDir
from nemo_ray.train import outputs, resources, summary
from nemo_ray.train.__main__ import main
from nemo_ray.train.launch import Launch, Parts
from nemo_ray.train.trackers import setup
from tests.train.launch_stub import SHAPE

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})}


def config(**changes: Any) -> Config:
    base = {"base_model": "base", "datasets": [{"path": "rows.jsonl"}], "output_dir": "outputs/out"}
    return Config.model_validate({**base, **changes})


FILE = FileInfo("rows.jsonl", "rows.jsonl", "x", "jsonl", 10, 0)
SOURCE = SourceInfo("rows.jsonl", "completion", (FILE,), 10, 0, 10, 3.0, False)


def data_plan(fingerprint: str = "f00d", rows: int = 10) -> DataPlan:
    window = Window(0, (Span(0, 0, 100, 0, rows),), rows, "key")
    return DataPlan("prepared", fingerprint, 64, WindowList([window]), WindowList(), (SOURCE,), (), 0)


def checkpoint(run: RunDir, step: int) -> Path:
    folder = run.checkpoint_dir(step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    return folder


# -- where files go -------------------------------------------------------------------------------


def test_a_submitted_job_is_known_by_its_metadata() -> None:
    assert outputs.submission_id(JOB) == "raysubmit_1"
    assert outputs.submission_id({}) is None
    assert outputs.submission_id({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) is None


def test_outputs_are_relative_to_the_directory_or_in_a_job_to_the_storage(tmp_path: Path) -> None:
    here = outputs.resolve_paths(config(), job=False, cwd=tmp_path)
    assert here.output_dir == str(tmp_path / "outputs/out")
    assert here.dataset_prepared_path == str(tmp_path / "outputs/out/prepared")
    job = outputs.resolve_paths(config(dataset_prepared_path="shards"), job=True, cwd=tmp_path)
    assert job.output_dir == os.path.expanduser("~/nemo_ray/outputs/out")
    assert job.dataset_prepared_path == os.path.expanduser("~/nemo_ray/shards")
    shared = config(output_dir="a", ray={"storage_path": "/shared"})
    assert outputs.resolve_paths(shared, job=True, cwd=tmp_path).output_dir == "/shared/a"
    for uri, resolved in (
        ("mlruns", "/shared/mlruns"),
        ("databricks", "databricks"),
        ("http://host", "http://host"),
    ):
        tracked = config(mlflow_tracking_uri=uri, ray={"storage_path": "/shared"})
        assert outputs.resolve_paths(tracked, job=True, cwd=tmp_path).mlflow_tracking_uri == resolved
    absolute = config(output_dir="/data/run")
    assert outputs.resolve_paths(absolute, job=True, cwd=tmp_path).output_dir == "/data/run"


def test_inputs_become_absolute_outside_a_job_only(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    here = outputs.resolve_paths(config(), job=False, cwd=tmp_path)
    assert here.base_model == str(tmp_path / "base")
    assert here.datasets[0].path == str(tmp_path / "rows.jsonl")
    assert here.chat_template == "tokenizer_default"
    job = outputs.resolve_paths(config(), job=True, cwd=tmp_path)
    assert (job.base_model, job.datasets[0].path) == ("base", "rows.jsonl")


# -- what may be overwritten ----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_an_empty_or_missing_directory_is_begun_fresh(run: RunDir) -> None:
    for changes in ({}, {"overwrite": True}, {"resume_from_checkpoint": "auto"}):
        assert outputs.decide_start(run, config(**changes)) == outputs.Start(None, replace=False)
    assert not run.path.exists()


def test_a_run_is_refused_naming_both_keys(run: RunDir) -> None:
    run.write_run({})
    with pytest.raises(ConfigError, match="resume_from_checkpoint=auto.*overwrite=true"):
        outputs.decide_start(run, config())


def test_overwrite_clears_the_run_when_the_new_one_begins(run: RunDir) -> None:
    run.write_run({})
    run.append_metrics({"step": 1})
    start = outputs.decide_start(run, config(overwrite=True))
    assert start.replace and run.read_metrics()  # nothing is deleted before everything is checked
    outputs.begin(run, start, data_plan())
    assert run.read_metrics() == [] and not run.holds_run() and run.data_plan_file.exists()


def test_overwrite_leaves_a_foreign_folder_alone(run: RunDir) -> None:
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        outputs.decide_start(run, config(overwrite=True))
    (run.path / "thesis.tex").unlink()
    run.model_dir.mkdir()
    (run.model_dir / "model.safetensors").write_text("somebody's")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"run\.json"):
            outputs.decide_start(run, config(**changes))


def test_auto_takes_the_newest_checkpoint_or_starts_fresh(run: RunDir) -> None:
    auto = config(resume_from_checkpoint="auto")
    run.write_run({})
    run.append_metrics({"step": 3})
    assert outputs.decide_start(run, auto) == outputs.Start(None, replace=True)
    checkpoint(run, 2)
    newest = checkpoint(run, 4)
    assert outputs.decide_start(run, auto) == outputs.Start(newest, replace=False)


def test_auto_does_not_throw_a_finished_result_away(run: RunDir) -> None:
    run.write_run({})
    run.adapter_dir.mkdir()
    with pytest.raises(ConfigError, match="overwrite=true"):
        outputs.decide_start(run, config(resume_from_checkpoint="auto"))


def test_going_back_to_an_older_checkpoint_sets_later_ones_aside(run: RunDir) -> None:
    run.write_run({})
    for step in (10, 20, 30):
        checkpoint(run, step)
    older = config(resume_from_checkpoint=str(run.checkpoint_dir(20)))
    start = outputs.decide_start(run, older)
    outputs.begin(run, start, data_plan())
    assert run.newest_checkpoint() == run.checkpoint_dir(20)
    assert len(list(run.checkpoints_dir.glob("step-30.superseded-*"))) == 1


def test_a_checkpoint_that_is_not_complete_is_refused(run: RunDir) -> None:
    run.checkpoint_dir(5).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no complete checkpoint"):
        outputs.decide_start(run, config(resume_from_checkpoint=str(run.checkpoint_dir(5))))


def test_a_continued_run_holds_to_its_data_plan(run: RunDir) -> None:
    outputs.begin(run, outputs.Start(None, replace=False), data_plan())
    outputs.check_plan(run, data_plan())
    for other in (data_plan("beef"), data_plan(rows=11)):
        with pytest.raises(ConfigError, match="data of .* changed since the run began"):
            outputs.check_plan(run, other)


def test_run_json_keeps_what_earlier_attempts_were(run: RunDir) -> None:
    first = outputs.run_facts(config(), data_plan(), 2, None)
    assert {"config", "versions", "git_revision", "data_fingerprint", "world_size"} <= first.keys()
    assert Config.model_validate(first["config"]) == config()
    outputs.record_run(run, first)
    run.update_run({"outcome": "stopped"})
    outputs.record_run(run, {**first, "world_size": 4})
    written = run.read_run()
    assert written["world_size"] == 4
    assert [(item["world_size"], item["outcome"]) for item in written["earlier"]] == [(2, "stopped")]


# -- resources ------------------------------------------------------------------------------------


def test_workers_by_default() -> None:
    assert resources.demand(config(), 0) == resources.Demand(1, False, {"CPU": 1.0})
    assert resources.demand(config(), 4) == resources.Demand(4, True, {"GPU": 1.0, "CPU": 1.0})
    two = config(ray={"num_workers": 2, "use_gpu": False})
    assert resources.demand(two, 4) == resources.Demand(2, False, {"CPU": 1.0})
    given = config(ray={"num_workers": 2, "resources_per_worker": {"CPU": 4, "GPU": 2}})
    assert resources.demand(given, 8).per_worker == {"GPU": 2.0, "CPU": 4.0}


def test_wrong_demands_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ray\.num_workers is required"):
        resources.require_num_workers(RaySection(), connected=True)
    resources.require_num_workers(RaySection(), connected=False)
    with pytest.raises(ConfigError, match="CPU is 0"):
        resources.demand(config(ray={"resources_per_worker": {"CPU": 0}}), 0)
    with pytest.raises(ConfigError, match="use_gpu=true"):
        resources.demand(config(ray={"resources_per_worker": {"GPU": 1}}), 0)
    with pytest.raises(ConfigError, match="dp_shard_size"):
        resources.demand(config(dp_shard_size=3), 4)


def test_the_mesh_is_filled_in() -> None:
    assert resources.mesh(8, None, None) == (1, 8)
    assert resources.mesh(8, 4, None) == (2, 4)
    assert resources.mesh(8, None, 4) == (4, 2)


def test_gpus_are_counted_without_torch() -> None:
    assert resources.gpus_here({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert resources.gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert resources.gpus_here({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_a_local_ray_has_a_cpu_to_spare_for_data() -> None:
    wanted = resources.Demand(64, False, {"CPU": 0.5})
    assert resources.local_cpus(wanted) == max(33, resources.cpus_here())
    many = resources.Demand(1000, False, {"CPU": 1.0})
    assert resources.local_cpus(many) == 1001
    assert resources.place(many, [{"CPU": 1001.0}], None)


def test_data_runs_beside_the_workers_where_a_cpu_is_left() -> None:
    two = resources.Demand(2, False, {"CPU": 1.0})
    assert resources.place(two, [{"CPU": 3.0}], None)
    assert not resources.place(two, [{"CPU": 2.0}], None)
    assert resources.place(two, [{"CPU": 2.0}, {"CPU": 1.0}], None)
    halves = resources.Demand(2, False, {"CPU": 1.5})
    assert not resources.place(
        halves, [{"CPU": 2.0}, {"CPU": 2.0}], None
    )  # half a CPU on each node is no CPU
    gpus = resources.Demand(8, True, {"CPU": 1.0, "GPU": 1.0})
    assert resources.place(gpus, [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 8.0}], None)


def test_as_many_workers_as_there_is_room_for() -> None:
    some = resources.demand(config(ray={"num_workers": [2, 4]}), 0)
    assert (some.at_least, some.num_workers) == (2, 4)
    assert resources.place(some, [{"CPU": 5.0}], None)
    assert not resources.place(some, [{"CPU": 3.0}], None)  # three workers leave nothing
    with pytest.raises(ClusterError, match=r"^2 workers with .* room for 1"):
        resources.place(some, [{"CPU": 1.0}], None)


def test_workers_that_do_not_fit_are_refused_with_numbers_and_a_remedy() -> None:
    wanted = resources.Demand(4, True, {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(ClusterError, match=r"4 workers with 8 CPU \+ 1 GPU.*32 CPU \+ 2 GPU.*num_workers=2"):
        resources.place(wanted, [{"CPU": 16.0, "GPU": 1.0}] * 2, None)
    scattered = resources.Demand(1, False, {"CPU": 8.0})
    with pytest.raises(ClusterError, match="room for 0"):
        resources.place(scattered, [{"CPU": 4.0}] * 4, None)
    other = resources.Demand(1, True, {"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(ClusterError, match="accelerator_type:H100"):
        resources.place(other, [{"CPU": 4.0, "GPU": 1.0, "accelerator_type:A100": 1.0}], "H100")
    with pytest.raises(ClusterError, match="0.5 CPUs"):
        resources.place(resources.Demand(1, False, {"CPU": 0.01}), [{"CPU": 0.5}], None)


def test_addresses() -> None:
    assert session.address_to_join(RaySection(), {}) is None
    assert session.address_to_join(RaySection(), {"RAY_ADDRESS": "a:1"}) == "a:1"
    assert session.address_to_join(RaySection(address="b:2"), {"RAY_ADDRESS": "a:1"}) == "b:2"
    assert session.address_to_join(RaySection(address="local"), {"RAY_ADDRESS": "a:1"}) is None


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    for address, words in (
        ("127.0.0.1:1", "not reachable"),
        ("http://head:8265", "ray job submit"),
        ("ray://head:10001", "ray job submit"),
        ("head", "HOST:PORT"),
    ):
        environment = session.Environment()
        try:
            with pytest.raises(ClusterError, match=words):
                session.connect(address, environment)
        finally:
            environment.restore()


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_TEST_SET", "user's")
    environment = session.Environment()
    environment.add({"NEMO_TEST_SET": "ours", "NEMO_TEST_NEW": "ours"})
    assert (os.environ["NEMO_TEST_SET"], os.environ["NEMO_TEST_NEW"]) == ("user's", "ours")
    environment.restore()
    assert os.environ["NEMO_TEST_SET"] == "user's" and "NEMO_TEST_NEW" not in os.environ


# -- what went wrong ------------------------------------------------------------------------------


class WorkerGroupError(Exception):
    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nTraceback ...")
        self.worker_failures = worker_failures


class ControllerError(Exception):
    def __init__(self, controller_failure: Exception) -> None:
        super().__init__("Training failed due to controller error")
        self.controller_failure = controller_failure


class ActorDiedError(Exception):
    pass


ActorDiedError.__module__ = "ray.exceptions"


def test_the_cause_is_found_inside_rays_errors() -> None:
    ours = PatchError("document B moved")
    assert failures.root_cause(ControllerError(ours)) is ours
    assert failures.root_cause(ControllerError(WorkerGroupError({0: ours}))) is ours
    assert failures.one_line(ControllerError(ours)) == "document B moved"
    plain = ValueError("shapes differ\nsecond line")
    assert failures.one_line(WorkerGroupError({1: plain})) == "ValueError: shapes differ"
    assert failures.one_line(KeyError()) == "KeyError"
    assert len(failures.one_line(ValueError("x" * 5000))) < 500


def test_an_echo_of_a_lost_peer_is_not_the_cause() -> None:
    echo = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")
    real = ZeroDivisionError("division by zero")
    assert failures.root_cause(WorkerGroupError({0: echo, 1: real})) is real
    ours = DataError("row 3")
    assert failures.root_cause(WorkerGroupError({0: echo, 1: real, 2: ours})) is ours
    assert failures.root_cause(WorkerGroupError({0: echo, 1: echo})) is echo


def test_a_lost_process_is_worded_for_the_user() -> None:
    died = "The actor died unexpectedly before finishing this task."
    for name, line in (
        ("RayTrainWorker", f"a training worker was lost (killed, or out of memory): {died}"),
        ("TrainController", f"Ray's training controller was lost (killed, or out of memory): {died}"),
        ("Probe", f"Ray's actor Probe was lost (killed, or out of memory): {died}"),
    ):
        lost = ActorDiedError(f"{died}\n\tclass_name: {name}\n\tactor_id: 0\n\tpid: 7\nThe actor is dead")
        assert failures.one_line(lost) == line
        assert failures.one_line(ControllerError(lost)) == line
    unknown = "Ray's training controller, or a worker, was lost (killed, or out of memory): "
    assert failures.one_line(ActorDiedError(died)) == unknown + died
    assert failures.one_line(ActorDiedError()) == unknown
    unloadable = ActorDiedError(
        "\x1b[36mdied in its creation task\x1b[39m\nModuleNotFoundError: No module 'x'"
    )
    assert failures.one_line(unloadable).endswith("processes: ModuleNotFoundError: No module 'x'")


def test_what_is_worth_a_restart() -> None:
    assert failures.is_final(PatchError("wrong")) and failures.is_final(ControllerError(ConfigError("no")))
    assert not failures.is_final(ClusterError("lost")) and not failures.is_final(ValueError("x"))
    assert failures.is_lost_worker(ActorDiedError("gone"))
    assert failures.is_lost_worker(RuntimeError("Connection reset by peer"))
    assert not failures.is_lost_worker(ValueError("x"))


# -- the command, up to Ray -----------------------------------------------------------------------


def inputs(folder: Path) -> Path:
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(SHAPE))
    (folder / "rows.jsonl").write_text("{}\n")
    path = folder / "run.yaml"
    path.write_text(
        f"base_model: {folder / 'base'}\nadapter: lora\nlora_target_modules: [q_proj]\n"
        f"output_dir: {folder / 'run'}\ndatasets:\n  - path: {folder / 'rows.jsonl'}\n"
    )
    return path


@pytest.mark.parametrize(
    ("shape", "override", "message"),
    [
        ({}, "lora_target_modules=[q_porj]", "lora_target_modules: 'q_porj' matches nothing"),
        ({"hybrid_override_pattern": "MX", "layers_block_type": None}, "", "blocks of kind X"),
        ({"layers_block_type": None}, "", "has no blocks"),
        ({"head_dim": None, "hidden_size": None}, "", "lacks head_dim, hidden_size"),
    ],
)
def test_a_wrong_target_or_shape_leaves_the_run_that_it_would_replace(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shape: dict[str, Any],
    override: str,
    message: str,
) -> None:
    path = inputs(tmp_path)
    changed = {key: value for key, value in (SHAPE | shape).items() if value is not None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(changed))
    run = RunDir(tmp_path / "run")
    run.write_run({})
    run.append_metrics({"step": 1, "loss": 1.0})
    loaded = load_config(str(path), ["overwrite=true", *([override] if override else [])])
    assert Launch(loaded, Parts(plan=never, prepare=never, worker=never)).run() == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and message in told.err
    assert run.read_metrics()


def never(*_: Any) -> Any:
    raise AssertionError("called")


def test_a_refused_run_exits_2_in_one_line_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_config(str(inputs(tmp_path)))
    RunDir(tmp_path / "run").write_run({})
    assert Launch(loaded, Parts(plan=never, prepare=never, worker=never)).run() == 2
    told = capsys.readouterr()
    assert told.out == f"output: {tmp_path / 'run'}\n"
    assert told.err.count("\n") == 1 and told.err.startswith("error: output_dir: ")


def test_a_tracker_without_a_server_or_package_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(setup, "find_spec", lambda name: object() if name == "mlflow" else None)
    path = str(inputs(tmp_path))
    for override, words in (("use_mlflow=true", "needs a server"), ("wandb_project=p", "package wandb")):
        loaded = load_config(path, [override])
        assert Launch(loaded, Parts(plan=never, prepare=never, worker=never)).run() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line
    assert not (tmp_path / "run").exists()


def test_data_errors_exit_1_and_leave_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: Any) -> DataPlan:
        raise DataError("rows.jsonl: no usable row")

    loaded = load_config(str(inputs(tmp_path)))
    assert Launch(loaded, Parts(plan=plan, prepare=never, worker=never)).run() == 1
    assert capsys.readouterr().err == "error: rows.jsonl: no usable row\n"
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_reach_the_store_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that says that it is finished has its rows where they belong."""
    workers, run = resources.Demand(1, False, {"CPU": 1.0}), RunDir(tmp_path / "run")

    def push(run: RunDir) -> None:
        raise StorageError("s3://bucket/run/metrics.jsonl: writing failed 5 times: it is away")

    def train(launch: Launch, *_: Any) -> None:
        run.append_metrics({"step": 1, "loss": 1.0, "nonfinite_steps": 0})

    monkeypatch.setattr(Launch, "_enter_ray", lambda *_: (workers, True))
    monkeypatch.setattr(Launch, "_print_plan", lambda *_: None)
    monkeypatch.setattr(Launch, "_train", train)
    loaded = load_config(str(inputs(tmp_path)))
    parts = Parts(plan=lambda *_: data_plan(), prepare=never, worker=never)
    assert Launch(loaded, parts).run() == 0
    assert run.read_run()["outcome"] == "finished"
    monkeypatch.setattr(RunDir, "push", push)
    loaded = load_config(str(tmp_path / "run.yaml"), ["overwrite=true"])
    assert Launch(loaded, parts).run() == 1
    assert "error: s3://bucket/run/metrics.jsonl: writing failed" in capsys.readouterr().err
    assert run.read_run()["outcome"] == "failed"


def test_ctrl_c_before_ray_exits_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: Any) -> DataPlan:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("not interrupted")

    before = signal.getsignal(signal.SIGINT)
    loaded = load_config(str(inputs(tmp_path)))
    assert Launch(loaded, Parts(plan=plan, prepare=never, worker=never)).run() == 130
    assert "training had not begun" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_missing_file_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nowhere.yaml") and told.count("\n") == 1


def test_a_refused_run_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    path = inputs(tmp_path)
    RunDir(tmp_path / "run").write_run({})
    code = (
        "import sys; from nemo_ray.train.__main__ import main; "
        f"code = main([{str(path)!r}]); "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == "[]"


# -- texts ----------------------------------------------------------------------------------------


def test_the_result_names_what_there_is(run: RunDir) -> None:
    run.write_run({})
    run.append_metrics({"step": 0, "eval_loss": 4.0})
    run.append_metrics({"step": 20, "loss": 3.1, "nonfinite_steps": 0})
    run.append_metrics({"step": 20, "eval_loss": 3.0})
    run.adapter_dir.mkdir()
    rows = dict(summary.result_rows(run, 83))
    assert rows["held-out loss"] == "4.0000 before, 3.0000 after step 20 (-25.0%)"
    assert rows["steps"] == "20, last loss 3.1000" and "skipped" not in rows
    assert rows["adapter"] == str(run.adapter_dir) and "model" not in rows and "checkpoint" not in rows
    assert rows["time"] == "1:23"


def test_the_result_counts_the_steps_that_were_skipped(run: RunDir) -> None:
    run.write_run({})
    run.append_metrics({"step": 20, "loss": None, "nonfinite_steps": 2})
    rows = dict(summary.result_rows(run, 83))
    assert rows["steps"] == "20, last loss not finite"
    assert rows["skipped"] == f"2 steps without a finite loss or gradient; batches in {run.nonfinite_dir}"


def test_sizes() -> None:
    assert (summary.gib(2**31), summary.gib(3 * 2**20)) == ("2.0 GiB", "3 MiB")
    wanted = resources.Demand(2, True, {"CPU": 1.0, "GPU": 1.0})
    text = summary.describe_workers(wanted, config(dp_shard_size=2), "a cluster")  # type: ignore[arg-type]
    assert text == "2 with 1 CPU + 1 GPU each, mesh 1 x 2 (replicate x shard), on a cluster"
    text = summary.describe_workers(wanted, config(), "a cluster")  # type: ignore[arg-type]
    assert text == "2 with 1 CPU + 1 GPU each, as few to a copy of the base as hold it, on a cluster"
    text = summary.describe_workers(resources.Demand(2, False, {"CPU": 1.0}), config(), "a cluster")
    assert text == "2 with 1 CPU each, mesh 1 x 2 (replicate x shard), on a cluster"
