"""What travels with a job, and what does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.submit import bundle as bundles
from nemo_ray.submit.bundle import bundle


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what a run reads, and with what is nobody's business."""
    folder = tmp_path / "work"
    for name, text in {
        "base/config.json": "{}",
        "base/model.safetensors": "w" * 1000,
        "data/a.jsonl": "{}\n",
        "data/b.jsonl": "{}\n",
        "data/c.txt": "no\n",
        "my.jinja": "template",
        ".env": "HF_TOKEN=secret",
        "outputs/run/checkpoints/step-1/state.json": "{}",
        "other.py": "print()",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def config(here: Path, **keys: object) -> Config:
    lines = {"base_model": "base", "adapter": "lora", "lora_target_modules": ["q_proj"]}
    lines |= {"datasets": [{"path": "data/*.jsonl"}], "output_dir": "outputs/run"} | keys
    (here / "configs").mkdir(exist_ok=True)
    (here / "configs" / "run.yaml").write_text(repr(lines).replace("'", '"').replace("True", "true"))
    return load_config("configs/run.yaml", check_paths=False).config


def names(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("nemo_ray/")}


def test_only_what_is_named_travels(here: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    given = config(here, chat_template="my.jinja")
    assert bundle(Path("configs/run.yaml"), given, here, job) == "configs/run.yaml"
    assert names(job) == {
        "configs/run.yaml",
        "base/config.json",
        "base/model.safetensors",
        "data/a.jsonl",
        "data/b.jsonl",
        "my.jinja",
    }
    package = {path.relative_to(job).as_posix() for path in (job / "nemo_ray").rglob("*")}
    assert "nemo_ray/model/shapes/nemotron-3-nano-30b-a3b.json" in package
    assert not any("__pycache__" in name or "demo/assets/" in name for name in package)


def test_the_package_runs_where_it_lands(here: Path, tmp_path: Path) -> None:
    """Without being installed: the copy comes first on the path."""
    job = tmp_path / "job"
    bundle(Path("configs/run.yaml"), config(here), here, job)
    done = subprocess.run(
        [sys.executable, "-c", "import nemo_ray.train.__main__ as m; print(m.__file__)"],
        cwd=job,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(job / "nemo_ray/train/__main__.py"), done.stderr


def test_what_the_cluster_sees_itself_stays(here: Path, tmp_path: Path) -> None:
    given = config(
        here,
        base_model="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        datasets=[{"path": "s3://bucket/rows"}, {"path": "/shared/rows.jsonl"}, {"path": "owner/rows"}],
        chat_template="tokenizer_default",
    )
    job = tmp_path / "job"
    bundle(Path("configs/run.yaml"), given, here, job)
    assert names(job) == {"configs/run.yaml"}


def test_the_demos_base_travels_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(bundles.__file__).parents[2]
    monkeypatch.chdir(root)
    given = load_config("configs/quickstart.yaml", check_paths=False).config
    bundle(Path("configs/quickstart.yaml"), given, root, tmp_path / "job")
    assert (tmp_path / "job/nemo_ray/demo/assets/base/config.json").is_file()
    assert (tmp_path / "job/nemo_ray/demo/assets/chats.jsonl").is_file()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"datasets": [{"path": "data/none.jsonl"}]}, "datasets.0.path: data/none.jsonl is not here"),
        ({"datasets": [{"path": "data/*.parquet"}]}, "datasets.0.path: .* is not here"),
        ({"base_model": "./none"}, "base_model: ./none is not here"),
        ({"datasets": [{"path": "../secret.jsonl"}]}, "outside of the working directory"),
    ],
)
def test_what_cannot_travel_is_told(here: Path, tmp_path: Path, keys: dict[str, object], said: str) -> None:
    (tmp_path / "secret.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=said):
        bundle(Path("configs/run.yaml"), config(here, **keys), here, tmp_path / "job")


def test_too_much_names_the_largest(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="base_model: base has 0 MiB; at most 0 MiB travel"):
        bundle(Path("configs/run.yaml"), config(here), here, tmp_path / "job")


def test_a_configuration_from_elsewhere_travels_too(here: Path, tmp_path: Path) -> None:
    given = config(here)
    (tmp_path / "far.yaml").write_bytes((here / "configs/run.yaml").read_bytes())
    assert bundle(tmp_path / "far.yaml", given, here, tmp_path / "job") == "far.yaml"
    assert (tmp_path / "job/far.yaml").is_file()
