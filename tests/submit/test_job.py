"""Jobs by name, their logs and their exit codes; the job server is played here."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_ray.cli import main
from nemo_ray.errors import ClusterError, ConfigError
from nemo_ray.submit import __main__ as command
from nemo_ray.submit import job as jobs_module
from nemo_ray.submit.job import Attempt, Jobs, check_name, next_id

ROOT = Path(command.__file__).parents[2]


class Server:
    """Stands for JobSubmissionClient."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[Any]] = {}
        """By id, (status, exit code, message) at each look; the last one stays."""
        self.logs: dict[str, list[Any]] = {}
        """By id, for each connection the texts that it brings; an exception ends it."""
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(
                submission_id=name,
                status=SimpleNamespace(value=looks[0][0]),
                driver_exit_code=looks[0][1],
            )
            for name, looks in self.jobs.items()
        ]

    def get_job_info(self, name: str) -> Any:
        looks = self.jobs[name]
        found = looks.pop(0) if len(looks) > 1 else looks[0]
        if isinstance(found, Exception):
            raise found
        status, code, message = found
        return SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code, message=message)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.logs[name].pop(0):
            if isinstance(text, BaseException):
                raise text
            yield text

    def submit_job(self, **given: Any) -> str:
        folder = Path(given["runtime_env"]["working_dir"])
        self.submitted.append(given | {"files": {path.name for path in folder.iterdir()}})
        name = given["submission_id"] or "raysubmit_1"
        self.jobs[name], self.logs[name] = [("SUCCEEDED", 0, "")], [["done\n"]]
        return name


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: made)
    monkeypatch.setattr(jobs_module, "_POLL_S", 0.0)
    monkeypatch.setattr(jobs_module, "_ENDS_WITHIN_S", 0.05)
    monkeypatch.chdir(ROOT)
    return made


FAILED = "Job entrypoint command failed with exit code 2, last available logs"


@pytest.mark.parametrize(
    ("looks", "code"),
    [
        ([("SUCCEEDED", 0, "")], 0),
        ([("RUNNING", None, ""), ("RUNNING", None, ""), ("FAILED", None, FAILED), ("FAILED", 2, FAILED)], 2),
        ([("FAILED", None, FAILED)], 1),  # it never tells
        ([("STOPPED", None, "")], 130),
        ([RuntimeError("busy"), ("FAILED", 3, FAILED)], 3),
    ],
)
def test_the_code_is_that_of_the_command(server: Server, looks: list[Any], code: int) -> None:
    server.jobs["a"], server.logs["a"] = looks, [["x"], ["x"], ["x"], ["x"]]
    assert Jobs(None).follow("a", lambda text: None) == code


def test_a_log_that_breaks_off_goes_on_where_it_was(server: Server) -> None:
    server.jobs["a"] = [("RUNNING", None, ""), ("RUNNING", None, ""), ("SUCCEEDED", 0, "")]
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    server.logs["a"] = [["one\n", "tw", broken], ["one\ntwo\n", "three\n"], ["one\ntwo\nthree\nfour\n"]]
    said: list[str] = []
    Jobs(None).follow("a", said.append)
    assert "".join(said) == "one\ntwo\nthree\nfour\n"


def test_a_cluster_that_is_gone_ends_it(server: Server) -> None:
    server.jobs["a"] = [OSError("refused")]
    server.logs["a"] = [[OSError("refused")]] * 50
    with pytest.raises(ClusterError, match="does not answer any more: refused"):
        Jobs(None).follow("a", lambda text: None)


def test_a_job_server_that_refuses_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise RuntimeError("Request failed with status code 401: no token.\nmore")

    server.list_jobs = refuse  # type: ignore[assignment]
    assert submit("--id", "mine") == 1
    assert capsys.readouterr().err == (
        "error: the cluster does not list its jobs: Request failed with status code 401: no token.\n"
    )


def test_a_job_that_never_ran_says_why(server: Server) -> None:
    server.jobs["a"] = [("FAILED", None, "runtime_env setup failed: no space left\nmore")]
    server.logs["a"] = [[]]
    with pytest.raises(
        ClusterError, match="before its command ran: runtime_env setup failed: no space left$"
    ):
        Jobs(None).follow("a", lambda text: None)


def test_names() -> None:
    assert next_id("run", None) == "run" and next_id("run", Attempt("run-9", 9, "FAILED")) == "run-10"
    for name in ("run", "a.b_c-d", "run-2b"):
        check_name(name)
    for name in ("run-2", "a b", "", "-a", "a/b"):
        with pytest.raises(ConfigError, match="--id"):
            check_name(name)


def submit(*arguments: str) -> int:
    return main(["submit", "configs/quickstart.yaml", "ray.storage_path=/shared", *arguments])


def test_a_first_job(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "w_secret")
    code = submit("base_model=owner/model", "wandb_project=p", "--id", "mine", "--env", "HF_TOKEN")
    said = capsys.readouterr().out
    (job,) = server.submitted
    assert (
        code == 0
        and job["submission_id"] == "mine"
        and job["runtime_env"]["env_vars"] == {"HF_TOKEN": "hf_secret"}
    )
    words = "python -m nemo_ray.train configs/quickstart.yaml ray.storage_path=/shared base_model=owner/model"
    assert job["entrypoint"] == f"{words} wandb_project=p" and job["files"] >= {"nemo_ray", "configs"}
    assert "secret" not in said and "with HF_TOKEN" in said and "done\n" in said
    assert "note: WANDB_API_KEY: set here, and not passed on; --env WANDB_API_KEY does" in said


def test_the_same_again(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.jobs["mine"] = [("RUNNING", None, ""), ("SUCCEEDED", 0, "")]
    server.logs["mine"] = [["from before\n"], ["from before\n"]]
    assert submit("--id", "mine") == 0 and not server.submitted
    said = capsys.readouterr().out
    assert "job mine is running: nothing new was handed in" in said and "from before" in said
    assert submit("--id", "mine") == 0
    (job,) = server.submitted
    assert job["submission_id"] == "mine-2" and job["entrypoint"].endswith(" resume_from_checkpoint=auto")
    assert "going on from mine" in capsys.readouterr().out


def test_what_was_refused_is_not_gone_on_with(server: Server) -> None:
    """It may have met another run in its output_dir, which is not its own to continue."""
    server.jobs["mine"] = [("FAILED", 2, FAILED)]
    assert submit("--id", "mine") == 0
    (job,) = server.submitted
    assert job["submission_id"] == "mine-2" and "resume" not in job["entrypoint"]


def test_a_sweep_goes_on_too(server: Server) -> None:
    for _ in range(2):
        assert main(["submit", "configs/sweep-quickstart.yaml", "--id", "sweep"]) == 0
    first, second = (job["entrypoint"] for job in server.submitted)
    assert first == "python -m nemo_ray.tune configs/sweep-quickstart.yaml"
    assert second == f"{first} --resume"


def test_detached(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--detach", "--address", "http://h:8265") == 0
    said = capsys.readouterr().out
    assert "ray job logs --address=http://h:8265 --follow raysubmit_1" in said and "done" not in said


def test_ctrl_c_leaves_the_job_alone(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.jobs["mine"], server.logs["mine"] = [("RUNNING", None, "")], [["some\n", KeyboardInterrupt()]]
    assert submit("--id", "mine") == 130
    assert "job mine goes on; `ray job stop mine` ends it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learning_rate=-1"], "learning_rate: -1"),
        (["--env", "NO_SUCH_NAME"], "--env: NO_SUCH_NAME is not set here; set it first"),
        (["--env", "KEY=secret"], "--env: KEY is not set here; give its name alone"),
        (["--id", "run-2"], "--id: 'run-2' is not valid"),
        (["datasets=[{path: none.jsonl}]"], "datasets.0.path: none.jsonl is not here"),
    ],
)
def test_wrong_input_is_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert submit(*arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}") and told.count("\n") == 1 and "secret" not in told
    assert not server.submitted


def test_standard_input_does_not_travel(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "-"]) == 2
    assert capsys.readouterr().err.startswith("error: CONFIG.yaml: - is standard input, which cannot travel")
    assert not server.submitted


def test_no_cluster_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert submit("--address", "http://127.0.0.1:9") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: no Ray job server answers at http://127.0.0.1:9") and told.count("\n") == 1
