"""Secrets of the environment and in URLs reach no file of a run, no page, no log and no terminal.

tests/test_storage.py, tests/test_hub.py, tests/config/test_config_bad.py, tests/train/test_trackers.py and
tests/submit/test_job.py have more: what a store, the hub, trackers and a job are given and say.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray import object_store, urls
from nemo_ray.cli import main
from nemo_ray.config.load import load_config
from nemo_ray.errors import ClusterError, ConfigError
from nemo_ray.failures import one_line
from nemo_ray.hub_cache import Repository, explained
from nemo_ray.run_dir import RunDir
from nemo_ray.train import outputs
from nemo_ray.train.__main__ import main as train
from nemo_ray.train.launch import Launch, Parts
from nemo_ray.train.resources import Demand
from tests.security import is_one_line
from tests.submit.test_job import Server, server, submit
from tests.train.launch_stub import write_inputs
from tests.train.test_launch import config, data_plan
from tests.view.runs import write_run

__all__ = ["server"]
pytestmark = pytest.mark.timeout(60)
HIDDEN = "hid+den"
VARIABLES = {
    name: f"{HIDDEN}-{name}"
    for name in (
        *("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY"),
    )
}
IN_URLS = {
    "password": f"https://me:{HIDDEN}@host:5000/path",
    "token as user": f"https://{HIDDEN}@host/path",
    "query": f"https://host/rows.jsonl?token={HIDDEN}&x=1",
    "key with a slash": f"s3://AKIA:abc/{HIDDEN}@bucket/rows.jsonl",
    "key": f"s3://AKIA:{HIDDEN}@bucket/rows.jsonl",
}


# -- in URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", IN_URLS.values(), ids=IN_URLS)
def test_a_url_is_shown_without_them(url: str) -> None:
    assert HIDDEN not in urls.redact(url)
    assert HIDDEN not in urls.redact(f"{url} and {url}: cannot be read ('{url}')")


@pytest.mark.parametrize("url", IN_URLS.values(), ids=IN_URLS)
@pytest.mark.parametrize("key", ["output_dir", "dataset_prepared_path", "base_model", "datasets"])
def test_a_url_with_one_is_refused_and_not_repeated(
    url: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AWS's keys have slashes in them, one in two."""
    keys: dict[str, Any] = {"base_model": "owner/model", "datasets": [{"path": "owner/rows"}]}
    keys[key] = [{"path": url}] if key == "datasets" else url
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError) as raised:
        load_config(str(tmp_path / "run.yaml"))
    assert is_one_line(str(raised.value)) and HIDDEN not in str(raised.value)


WRONG: list[dict[str, Any]] = [
    {"hf_token": HIDDEN},
    {"wandb_api_key": HIDDEN},
    {"ray": {"auth_token": HIDDEN}},
    {"datasets": [{"path": "owner/rows", "token": HIDDEN}]},
    {"output_dir": [IN_URLS["password"]]},
]


@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_a_secret_in_the_wrong_key_is_not_repeated(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"base_model": "owner/model", "datasets": [{"path": "owner/rows"}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(known | keys))
    assert train([str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr()
    assert is_one_line(said.err) and HIDDEN not in said.out + said.err


# -- in a run's files -----------------------------------------------------------------------------


def test_what_a_run_records_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    run = write_run(tmp_path / "run", outcome="finished")
    outputs.record_run(run, {**run.read_run(), **outputs.run_facts(config(), data_plan(), 2, "job")})
    assert main(["report", str(run.path)]) == 0 and main(["status", str(run.path)]) == 0
    assert not holding(run.path, HIDDEN) and HIDDEN not in capsys.readouterr().out


def test_a_trackers_password_is_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it is refused, or taken out."""
    file = write_inputs(tmp_path / "inputs")
    try:
        asked = load_config(str(file), [f"mlflow_tracking_uri={IN_URLS['password']}"]).config
    except ConfigError as error:
        assert is_one_line(str(error)) and HIDDEN not in str(error)
        return
    run = write_run(tmp_path / "run", outcome="finished")
    outputs.record_run(run, {**run.read_run(), **outputs.run_facts(asked, data_plan(), 2, None)})
    assert main(["report", str(run.path)]) == 0 and main(["status", str(run.path)]) == 0
    assert not holding(run.path, HIDDEN) and HIDDEN not in capsys.readouterr().out


def holding(folder: Path, secret: str) -> list[str]:
    """Files with a secret in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if secret.encode() in path.read_bytes()]


def test_a_run_that_fails_leaves_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver, with what runs on Ray left out: run.json, error.log, metrics, and all that is printed."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    run = RunDir(tmp_path / "run")

    def fail(launch: Launch, *_: Any) -> None:
        run.append_metrics({"step": 1, "loss": 4.0})
        raise ValueError("shapes differ")

    monkeypatch.setattr(Launch, "_enter_ray", lambda *_: (Demand(2, False, {"CPU": 1.0}), False))
    monkeypatch.setattr(Launch, "_train", fail)
    loaded = load_config(str(write_inputs(tmp_path / "inputs")), [f"output_dir={run.path}"])
    parts = Parts(plan=lambda *_: data_plan(), prepare=lambda *_: None, worker=lambda _: None)
    assert Launch(loaded, parts).run() == 1
    told = capsys.readouterr()
    assert "shapes differ" in told.err and run.read_run()["outcome"] == "failed"
    assert "in fail" in run.error_file.read_text()
    assert not holding(tmp_path, HIDDEN) and HIDDEN not in told.out + told.err


# -- in errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", IN_URLS.values(), ids=IN_URLS)
def test_the_error_of_a_library_is_shown_without_them(tmp_path: Path, url: str) -> None:
    """As HTTP clients tell of them; it goes to the terminal, run.json, the report and error.log."""
    error = ConnectionError(f"Max retries exceeded with url: {url} (Caused by ProxyError)")
    assert HIDDEN not in one_line(error)
    assert HIDDEN not in one_line(ClusterError(f"the server cannot be reached: {error}"))
    run = RunDir(tmp_path)
    run.append_error("driver", f"Traceback (most recent call last):\n{error}\n")
    assert "Traceback" in run.error_file.read_text() and not holding(tmp_path, HIDDEN)


@pytest.mark.parametrize("url", IN_URLS.values(), ids=IN_URLS)
def test_the_hubs_errors_are_told_without_them(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def told(work: Callable[[], None]) -> str:
        with pytest.raises(ConfigError) as raised, explained(Repository("o/n"), "main", ConfigError):
            work()
        return str(raised.value)

    def fail() -> None:
        raise ConnectionError(f"cannot connect to {url}")

    assert HIDDEN not in told(fail)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    assert "o/n" in told(fail) and HIDDEN not in told(fail)


def test_a_stores_endpoint_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", IN_URLS["password"])
    _, said = object_store._diagnose("curlCode: 7, Couldn't connect to server", urls.parse("s3://bucket/x"))
    assert "AWS_ENDPOINT_URL" in said and HIDDEN not in said


# -- with a job -----------------------------------------------------------------------------------


def test_a_job_is_told_of_without_values(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    options = [word for name in VARIABLES for word in ("--env", name)]
    assert submit("wandb_project=p", "base_model=owner/model", *options) == 0
    (job,) = server.submitted
    assert job["runtime_env"]["env_vars"] == VARIABLES and HIDDEN not in job["entrypoint"]
    told = capsys.readouterr()
    assert "with HF_TOKEN, WANDB_API_KEY" in told.out and HIDDEN not in told.out + told.err


def test_a_jobs_command_is_told_without_passwords(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    submit(f"mlflow_tracking_uri={IN_URLS['password']}")
    told = capsys.readouterr()
    assert HIDDEN not in told.out + told.err
