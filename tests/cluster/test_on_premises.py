"""The launcher file for machines of one's own: Ray takes it, every key is read, its commands are Ray's.

tests/e2e/test_launched_cluster.py starts a cluster from it.
"""

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

FOLDER = Path(__file__).parents[2] / "cluster" / "on-premises"
OF_PROVIDER = {"type", "head_ip", "worker_ips", "external_head_ip"}
"""What Ray's provider for given machines reads. Ray's own schema lets any key through there."""


def cluster() -> dict[str, Any]:
    """The file."""
    return dict(yaml.safe_load((FOLDER / "cluster.yaml").read_text()))


def problems(config: dict[str, Any]) -> list[str]:
    """What Ray says, and what it would pass over in silence."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # of its schema, of the provider, of a key that is not there
        return [str(error)]
    unread = config["provider"].keys() - OF_PROVIDER
    return [*(f"provider.{key}" for key in unread), *command_problems(config)]


def command_problems(config: dict[str, Any]) -> Iterator[str]:
    """Options that Ray's commands do not have."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in config[key]:
            yield from (f"{key}: {option}" for option in unknown_options(line))


def unknown_options(line: str) -> list[str]:
    """Options of a `ray` command, behind variables of its environment, that it does not have."""
    words = shlex.split(line)
    name = words[words.index("ray") + 1]
    known = {option for param in cli.commands[name].params for option in param.opts}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [option for option in given if option not in known]


def keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Every key that has a fixed name: way there, key."""
    for key, inner in value.items():
        yield pytest.param(path, key, id=".".join((*path, key)))
        if isinstance(inner, dict) and key != "file_mounts":  # its keys are paths
            yield from keys(inner, (*path, key))


def test_ray_takes_it() -> None:
    assert problems(cluster()) == []


@pytest.mark.parametrize(("path", "key"), list(keys(cluster())))
def test_a_misspelled_key_is_found(path: tuple[str, ...], key: str) -> None:
    changed = place = cluster()
    for step in path:
        place = place[step]
    place[f"{key}x"] = place.pop(key)
    assert problems(changed), f"{key}x passes"


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_a_misspelled_option_is_found(key: str) -> None:
    options = re.findall(r"--[a-z-]+", cluster()[key][-1])
    for option in options:
        changed = cluster()
        changed[key][-1] = changed[key][-1].replace(option, f"{option}x", 1)
        assert problems(changed) == [f"{key}: {option}x"]
    assert len(options) >= 2


def test_all_machines_are_kept_and_ask_for_the_token() -> None:
    config = cluster()
    prepared = prepare_config(copy.deepcopy(config))
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, start = config[key]
        assert stop == "ray stop" and "RAY_AUTH_MODE=token ray start" in start
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head


def test_the_recipe_uses_options_that_exist() -> None:
    text = (FOLDER / "README.md").read_text()
    starts = [line for line in text.splitlines() if line.startswith("ray start")]
    assert len(starts) == 2 and "--head" in starts[0] and "--dashboard-host=127.0.0.1" in starts[0]
    for line in starts:
        assert unknown_options(line) == []
    before = [block for block in text.split("```bash") if "ray start -" in block.partition("```")[0]]
    assert len(before) == 2 and all("export RAY_AUTH_MODE=token" in block for block in before)


def test_both_texts_name_the_files_machines() -> None:
    config = cluster()
    hosts = " ".join(config["provider"]["worker_ips"])
    user = config["auth"]["ssh_user"]
    line = f"for host in {hosts}; do ssh {user}@$host 'bash -ic \"ray stop\"'; done"
    for name in ("README.md", "cluster.yaml"):
        assert line in (FOLDER / name).read_text(), name
