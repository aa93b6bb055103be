"""A configuration is plain data: tags that make objects are refused by one line, and nothing is called."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_ray.config.load import load_config
from nemo_ray.errors import ConfigError
from nemo_ray.tune.load import load_sweep
from tests.security import is_one_line

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
TAGS = {
    "function": "!!python/object/apply:os.mkdir ['{mark}']",
    "new object": "!!python/object/new:os.mkdir ['{mark}']",
    "module": "!!python/module:this",
    "name": "!!python/name:os.mkdir",
    "tuple": "!!python/tuple [1, 2]",
    "our own": "!mkdir '{mark}'",
}
PLACES = {
    "a value": "base_model: {}\n",
    "in a list": "datasets:\n  - path: {}\n",
    "a section": "ray: {}\n",
    "below a new name": "x: &x {}\nbase_model: *x\n",
    "the whole file": "{}\n",
}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_tag_here_would_leave_its_mark(mark: Path) -> None:
    yaml.load(TAGS["function"].format(mark=mark), Loader=yaml.UnsafeLoader)
    assert mark.is_dir()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", PLACES)
def test_a_tag_is_refused_wherever_it_stands(tmp_path: Path, mark: Path, tag: str, place: str) -> None:
    path = write(tmp_path / "run.yaml", PLACES[place].format(TAGS[tag].format(mark=mark)))
    for load in (load_config, lambda file: load_sweep(file, [])):
        with pytest.raises(ConfigError) as raised:
            load(path)
        line = str(raised.value)
        assert is_one_line(line) and line.startswith(path) and "only plain text, numbers" in line
        assert not mark.exists() and "this" not in sys.modules


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_an_override_is_refused(tmp_path: Path, mark: Path, tag: str) -> None:
    path = write(tmp_path / "run.yaml", "datasets: [{path: rows.jsonl}]\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, [f"base_model={TAGS[tag].format(mark=mark)}"], check_paths=False)
    assert is_one_line(str(raised.value)) and not mark.exists()


def test_the_command_refuses_it_with_exit_code_2(tmp_path: Path, mark: Path) -> None:
    path = write(tmp_path / "run.yaml", PLACES["a value"].format(TAGS["function"].format(mark=mark)))
    command = [sys.executable, "-m", "nemo_ray.train", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert is_one_line(done.stderr) and done.stderr.startswith(f"error: {path}, line 1: ")
    assert not mark.exists() and list(tmp_path.iterdir()) == [Path(path)]
