"""Base models from the hub: what is asked of it, what is kept, and what the user is told.

huggingface_hub reads its environment when it is imported, so each case is a process of its own, as in
production, against a hub on loopback.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ray import hub as hub_module
from nemo_ray import session
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.hub import is_reference, local_folder, reference, variables_to_pass_on
from nemo_ray.run_dir import RunDir
from nemo_ray.train import outputs
from tests.hub_server import HubServer, sha256

REPOSITORY = Path(__file__).parents[1]
BASE = REPOSITORY / "nemo_ray" / "demo" / "assets" / "base"
NAME = "tester/tiny"
WEIGHTS = {"model-1.safetensors": b"one" * 50_000, "model-2.safetensors": b"two" * 50_000}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
LARGE = os.urandom(1_000_000) * 32
"""More than the 10 MiB in which huggingface_hub hands bytes on."""
FETCH = (
    "import sys; from nemo_ray.hub import local_folder\n"
    "print(local_folder(sys.argv[1], weights=sys.argv[2] == 'weights', say=lambda text: print('say', text)))"
)


def small_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in BASE.iterdir() if path.suffix in (".json", ".jinja")}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """One model in two shards, with all that must never be fetched beside them."""
    with HubServer() as server:
        other = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "sub/model.safetensors": b"no"}
        server.add(NAME, small_files() | {"model.safetensors.index.json": INDEX} | WEIGHTS | other)
        yield server


def start(hub: HubServer, home: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=home.parent,
        env={**kept, **hub.environ(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


def fetch(
    hub: HubServer, home: Path, model: str = f"{NAME}@main", what: str = "weights", **variables: str
) -> Path:
    """The folder that another process fetches the model to."""
    out, err = end(start(hub, home, "-c", FETCH, model, what, **variables))
    assert out, err
    return Path(out.splitlines()[-1])


def refusal(hub: HubServer, home: Path, model: str = f"{NAME}@main", **variables: str) -> str:
    """The error that the fetch ends with: ours, of one line."""
    _, err = end(start(hub, home, "-c", FETCH, model, "weights", **variables))
    assert "nemo_ray.errors.CheckpointError: " in err
    line = err[err.rindex("nemo_ray.errors.CheckpointError: ") :].strip()
    assert "\n" not in line
    return line.partition(": ")[2]


# -- what is fetched ------------------------------------------------------------------------------


def test_weights_come_once_and_code_and_pickles_never(hub: HubServer, tmp_path: Path) -> None:
    commit = list(hub.repositories[NAME].commits)[0]
    small = fetch(hub, tmp_path / "home", what="small")
    assert (small / "tokenizer.json").read_bytes() == small_files()["tokenizer.json"]
    assert not any(hub.transfers(file) for file in WEIGHTS)
    folder = fetch(hub, tmp_path / "home", f"{NAME}@{commit}")
    assert folder == small and folder.name == commit
    assert all((folder / file).read_bytes() == content for file, content in WEIGHTS.items())
    assert {file: len(hub.transfers(file)) for file in WEIGHTS} == dict.fromkeys(WEIGHTS, 1)
    asked = {request.file for request in hub.requests}
    assert not asked & {"pytorch_model.bin", "modeling.py", "sub/model.safetensors"}
    hub.requests.clear()
    assert fetch(hub, tmp_path / "home", f"{NAME}@{commit}") == folder
    assert hub.requests == []  # a commit that is complete is not asked for again


def test_a_branch_is_looked_up_again_and_only_what_changed_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path / "home")
    files = dict(hub.repositories[NAME].commits[first.name]) | {"model-2.safetensors": b"new" * 50_000}
    commit = hub.add(NAME, files)
    hub.requests.clear()
    second = fetch(hub, tmp_path / "home")
    assert second.name == commit != first.name
    assert (second / "model-2.safetensors").read_bytes() == b"new" * 50_000
    assert [len(hub.transfers(file)) for file in WEIGHTS] == [0, 1]


def test_a_cut_connection_is_taken_up_where_it_broke(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, small_files() | {"model.safetensors": LARGE})
    hub.cut_after["model.safetensors"] = 20_000_000
    folder = fetch(hub, tmp_path / "home")
    assert (folder / "model.safetensors").read_bytes() == LARGE
    ranges = [request.range for request in hub.transfers("model.safetensors")]
    assert ranges[0] is None and len(ranges) == 2 and ranges[1] is not None


def test_a_killed_download_goes_on_from_its_last_byte(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, small_files() | {"model.safetensors": LARGE})
    hub.bytes_per_s = 6e6  # slow enough to be caught in the middle on a busy machine
    process = start(hub, tmp_path / "home", "-c", FETCH, f"{NAME}@main", "weights")
    until = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.rglob("*.nemo_ray.incomplete")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    hub.requests.clear()
    hub.bytes_per_s = None
    assert (fetch(hub, tmp_path / "home") / "model.safetensors").read_bytes() == LARGE
    (request,) = hub.transfers("model.safetensors")
    assert request.range is not None and int(request.range[len("bytes=") : -1]) > 0
    assert not list(tmp_path.rglob("*incomplete"))


def test_a_damaged_part_is_not_built_upon(hub: HubServer, tmp_path: Path) -> None:
    """As a crash of the machine leaves it: the right length, another content."""
    hub.add(NAME, small_files() | {"model.safetensors": LARGE})
    small = fetch(hub, tmp_path / "home", what="small")
    digest = sha256(LARGE)
    damaged = small.parents[1] / "blobs" / f"{digest}.nemo_ray.incomplete"
    damaged.write_bytes(bytes(11_000_000))
    assert (fetch(hub, tmp_path / "home") / "model.safetensors").read_bytes() == LARGE


def test_processes_of_a_node_wait_for_one_that_downloads(hub: HubServer, tmp_path: Path) -> None:
    hub.bytes_per_s = 60_000  # two shards of 150 kB, side by side
    processes = [start(hub, tmp_path / "home", "-c", FETCH, f"{NAME}@main", "weights") for _ in range(2)]
    outs = [end(process) for process in processes]
    folders = {out.splitlines()[-1] for out, _ in outs}
    assert len(folders) == 1 and Path(folders.pop()).is_dir(), outs
    assert {file: len(hub.transfers(file)) for file in WEIGHTS} == dict.fromkeys(WEIGHTS, 1)
    told = [line for out, _ in outs for line in out.splitlines() if "waiting for another process" in line]
    assert len(told) == 1 and NAME in told[0] and "nemo_ray.lock" in told[0]


def test_a_full_cache_needs_no_network(hub: HubServer, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path / "home")
    hub.requests.clear()
    assert fetch(hub, tmp_path / "home", HF_HUB_OFFLINE="1") == folder
    assert fetch(hub, tmp_path / "home", f"{NAME}@{folder.name}", HF_HUB_OFFLINE="1") == folder
    assert hub.requests == []
    for listing in (folder.parents[1] / "trees").iterdir():
        listing.unlink()  # as other programs fill a cache
    assert fetch(hub, tmp_path / "home", f"{NAME}@{folder.name}", HF_HUB_OFFLINE="1") == folder
    (folder / "model-2.safetensors").unlink()
    line = refusal(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in line and f"hf download {NAME}" in line


# -- who may have it ------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["gated", "private"])
def test_a_token_opens_what_is_closed_and_stays_with_the_hub(
    hub: HubServer, tmp_path: Path, access: str
) -> None:
    hub.repositories[NAME].access = access  # type: ignore[assignment]
    line = refusal(hub, tmp_path / "home")
    assert NAME in line and "HF_TOKEN" in line
    assert (f"accept the licence on {hub.url()}/{NAME}" in line) == (access == "gated")
    wrong = refusal(hub, tmp_path / "home", HF_TOKEN="hf_wrong")
    assert "the token in use has no access" in wrong and "hf_wrong" not in wrong
    hub.requests.clear()
    assert (fetch(hub, tmp_path / "home", HF_TOKEN="hf_right") / "config.json").is_file()
    at_hub = {
        request.authorization for request in hub.requests if NAME in request.path and not request.storage
    }
    assert at_hub == {"Bearer hf_right"}
    assert {request.authorization for request in hub.requests if request.storage} == {None}


# -- what goes wrong ------------------------------------------------------------------------------


def test_each_mistake_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    hub.add("tester/pickles", small_files() | {"pytorch_model.bin": b"pickle"})
    files = small_files() | {"model.safetensors.index.json": INDEX, "model-1.safetensors": b"one"}
    hub.add("tester/half", files)
    for model, words in {
        "tester/gone@main": ("tester/gone", "no folder here", hub.url()),
        f"{NAME}@v9": ("revision_of_model: v9", NAME),
        f"{NAME}@{'0' * 40}": ("revision_of_model: 0000", NAME),
        "tester/pickles@main": ("neither model.safetensors nor", "pytorch_model.bin"),
        "tester/half@main": ("names model-2.safetensors, which is not there",),
        "tester/bad--name@main": ("no id of a hub model",),
    }.items():
        line = refusal(hub, tmp_path / "home", model)
        assert all(word in line for word in words), line
    assert hub.transfers("pytorch_model.bin") == []
    hub.status = 503
    assert "answered 503" in refusal(hub, tmp_path / "other")
    line = refusal(hub, tmp_path / "other", HF_ENDPOINT="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in line and "HF_ENDPOINT" in line


# -- names ----------------------------------------------------------------------------------------


def config(**keys: object) -> Config:
    return Config.model_validate({"base_model": NAME, "datasets": [{"path": "rows.jsonl"}], **keys})


def test_a_folder_is_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "_snapshot", None)  # nothing may be fetched
    assert reference(config()) == f"{NAME}@main"
    assert reference(config(revision_of_model="v1")) == f"{NAME}@v1"
    Path(NAME).mkdir(parents=True)
    assert reference(config()) == NAME and hub_module.pin(config(), weights=True, here=True) == config()
    for path in (NAME, "./x/y", "/x/y", "x", "x/y/z", f"{NAME}@"):
        assert not is_reference(path) and local_folder(path, weights=True) == Path(path)
    Path(f"{NAME}@v1").mkdir()
    assert local_folder(f"{NAME}@v1", weights=True) == Path(f"{NAME}@v1")


# -- the driver -----------------------------------------------------------------------------------


def write_run(folder: Path, base_model: str = NAME) -> Path:
    (folder / "rows.jsonl").write_text(
        "".join(
            f'{{"messages": [{{"role": "user", "content": "Row {row}?"}}, '
            f'{{"role": "assistant", "content": "Yes, {row}."}}]}}\n'
            for row in range(40)
        )
    )
    path = folder / "run.yaml"
    path.write_text(
        f"base_model: {base_model}\nadapter: lora\nlora_target_modules: [q_proj]\nmax_steps: 2\n"
        "datasets:\n  - path: rows.jsonl\nsequence_len: 256\nray:\n  num_workers: 1\n"
    )
    return path


EARLY = """
import json, sys
from nemo_ray.config.load import load_config
from nemo_ray.errors import DataError
from nemo_ray.train.launch import Launch, Parts
from nemo_ray.train.resources import Demand

class Early(Launch):
    def _enter_ray(self, address, shape):
        return Demand(1, False, {"CPU": 1.0}), True

    def _train(self, plan, wanted, beside):
        run = json.loads((self.run_dir.path / "run.json").read_text())
        loaded = [name for name in ("torch", "ray", "transformers") if name in sys.modules]
        print("RESULT", json.dumps({"run": run, "config": self.config.to_dict(), "loaded": loaded}))
        raise DataError("far enough")

loaded = load_config(sys.argv[1])
assert "huggingface_hub" not in sys.modules  # the checks of the configuration ask no network
sys.exit(Launch.run(Early(loaded, Parts())))
"""


def test_the_driver_fetches_what_it_reads_and_holds_to_the_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = list(hub.repositories[NAME].commits)[0]
    path = write_run(tmp_path)
    out, err = end(start(hub, tmp_path / "home", "-c", EARLY, str(path), HF_TOKEN="hf_right"))
    assert err.strip() == "error: far enough" and "hf_right" not in out
    assert f"{NAME}@{commit}" in out.replace("\n", "")
    result = json.loads(next(line for line in out.splitlines() if line.startswith("RESULT"))[len("RESULT") :])
    assert result["run"]["base_model_commit"] == commit and result["loaded"] == []
    assert result["run"]["config"]["revision_of_model"] == "main"
    assert (result["config"]["base_model"], result["config"]["revision_of_model"]) == (NAME, commit)
    assert not any(hub.transfers(file) for file in WEIGHTS)  # weights are the workers' business


def test_what_the_driver_refuses_is_refused_before_anything_starts(hub: HubServer, tmp_path: Path) -> None:
    llama = small_files() | {"config.json": b'{"model_type": "llama"}'}
    hub.add("tester/llama", llama)
    hub.add("tester/pickles", small_files() | {"pytorch_model.bin": b"pickle"})
    home = tmp_path / "home"
    for name, words in {
        "tester/llama": ("tester/llama has model_type llama", "nemotron_h"),
        "tester/pickles": ("neither model.safetensors nor",),
        "tester/gone": ("tester/gone is no folder here",),
    }.items():
        process = start(hub, home, "-m", "nemo_ray.train", str(write_run(tmp_path, name)))
        _, err = end(process)
        assert process.returncode == 2 and err.startswith("error: base_model: ") and err.count("\n") == 1
        assert all(word in err for word in words), err
    hub.requests.clear()
    path = write_run(tmp_path)
    process = start(hub, home, "-m", "nemo_ray.train", str(path), "learning_rate=fast")
    assert end(process)[1].startswith("error: learning_rate: ") and process.returncode == 2
    assert hub.requests == []


def test_a_small_disk_is_seen_before_the_first_byte(hub: HubServer, tmp_path: Path) -> None:
    """By a worker, and by the driver where Ray is its own. 2 x 150 kB would fit, but not with 5% more."""
    patched = (
        "import shutil, collections\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(10**9, 0, 310_000)\n"
    )
    _, told = end(start(hub, tmp_path / "home", "-c", patched + FETCH, f"{NAME}@main", "weights"))
    driver = start(hub, tmp_path / "home", "-c", patched + EARLY, str(write_run(tmp_path)))
    _, refused = end(driver)
    assert driver.returncode == 2 and refused.startswith("error: base_model: ") and refused.count("\n") == 1
    for line in (told.strip().splitlines()[-1], refused):
        assert f"{NAME} needs 0.3 MB more" in line and "where 0.3 MB are free" in line and "HF_HOME" in line
        assert str(tmp_path / "home") in line
    assert not any(hub.transfers(file) for file in WEIGHTS)


def test_a_continued_run_keeps_the_commit_that_it_began_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    start_at = outputs.Start(run.checkpoint_dir(5), replace=False)
    assert outputs.base_revision(config(), start_at) == "main"  # nothing is known of the run
    run.path.mkdir()
    run.write_run({"config": config().to_dict(), "base_model_commit": "a" * 40})
    assert outputs.base_revision(config(), start_at) == "a" * 40
    assert outputs.base_revision(config(), outputs.Start(None, replace=True)) == "main"
    assert outputs.base_revision(config(revision_of_model="v2"), start_at) == "v2"
    assert outputs.base_revision(config(base_model="tester/other"), start_at) == "main"
    run.write_run({"config": config(base_model="folder").to_dict(), "base_model_commit": None})
    assert outputs.base_revision(config(base_model="folder"), start_at) == "main"


def test_notices_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path)
    assert load_config(str(path), ["revision_of_model=v1"]).config.revision_of_model == "v1"
    loaded = load_config(str(path), ["revision_of_model=v1", f"base_model={BASE}"])
    assert [notice for notice in loaded.notices if notice.startswith("revision_of_model: not used")]
    with pytest.raises(Exception, match="base_model: https.* is a URL; .* or a hub id"):
        load_config(str(path), ["base_model=https://huggingface.co/tester/tiny"])


# -- other nodes ----------------------------------------------------------------------------------


def test_variables_of_the_hub_reach_a_joined_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    told: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: told.append(options))
    environ = {"HF_TOKEN": "hf_right", "HF_HOME": "/shared", "HOME": "/root", "HF_OTHER": "x"}
    passed = variables_to_pass_on(config(), environ)
    assert passed == {"HF_TOKEN": "hf_right", "HF_HOME": "/shared"}
    assert variables_to_pass_on(config(base_model="./folder"), environ) == {}

    def runtime_env(variables: dict[str, str]) -> object:
        environment = session.Environment()
        try:
            session.connect("auto", environment, variables)
        finally:
            environment.restore()
        return told.pop()["runtime_env"]

    assert runtime_env(passed) == {"env_vars": passed}
    assert runtime_env({}) is None
    job = {"metadata": {}, "runtime_env": {"env_vars": {"HF_TOKEN": "hf_of_the_job"}}}
    monkeypatch.setenv(session.JOB_CONFIG_VARIABLE, json.dumps(job))
    assert runtime_env(passed) == {"env_vars": {"HF_HOME": "/shared"}}  # Ray refuses a variable given twice
