"""The image of the nodes: what its Dockerfile names is there, and the arguments arrive. Nothing is built."""

import fnmatch
import importlib.metadata
import os
import re
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray.autoscaler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "cluster" / "docker"
KERNELS = ["mamba-ssm", "causal-conv1d"]


@dataclass
class Stage:
    """What lies between two FROM."""

    image: str
    name: str
    args: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and the rest of it, in order."""

    def of(self, instruction: str) -> list[str]:
        """Its steps of one kind."""
        return [rest for name, rest in self.steps if name == instruction]


def _instructions() -> list[tuple[str, str]]:
    """Instruction and the rest, comments out and continued lines joined."""
    lines = (DOCKER / "Dockerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def _parse() -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage, with their defaults, and the stages."""
    outer: dict[str, str] = {}
    stages: list[Stage] = []
    for name, rest in _instructions():
        if name == "FROM":
            image, _, alias = rest.partition(" AS ")
            stages.append(Stage(image, alias))
        elif name == "ARG":
            key, _, value = rest.partition("=")
            (stages[-1].args if stages else outer)[key] = value.strip('"')
        else:
            stages[-1].steps.append((name, rest))
    return outer, stages


OUTER, STAGES = _parse()
BUILD, FINAL = STAGES


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def test_known_instructions_only() -> None:
    """A misspelt one would end the build after minutes."""
    assert {name for name, _ in _instructions()} == {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR"}


def test_every_argument_is_used() -> None:
    for name in OUTER:
        assert any(f"${{{name}}}" in stage.image for stage in STAGES), name
    for stage in STAGES:
        for name in stage.args:
            assert any(f"${{{name}}}" in rest for rest in stage.of("RUN")), name


def test_every_variable_that_is_used_is_an_argument() -> None:
    for stage in STAGES:
        assert set(re.findall(r"\$\{(\w+)\}", stage.image)) <= OUTER.keys()
        used = {name for _, rest in stage.steps for name in re.findall(r"\$\{(\w+)\}", rest)}
        assert used <= stage.args.keys()


def test_both_stages_are_the_pinned_ray() -> None:
    """A job and its cluster must agree, and what was compiled for one Python fits no other."""
    assert OUTER["RAY_VERSION"] == _pinned("ray") == ray.__version__
    for stage, platform in ((BUILD, "cu130"), (FINAL, "cpu")):
        assert stage.image == f"rayproject/ray:${{RAY_VERSION}}-${{PYTHON}}-{platform}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    major, minor = re.fullmatch(r"py(\d)(\d+)", OUTER["PYTHON"]).groups()  # type: ignore[union-attr]
    assert f"{major}.{minor}" in Requirement(f"python{project['requires-python']}").specifier


def test_copied_files_exist_and_reach_the_build() -> None:
    stages = {stage.name for stage in STAGES}
    rules = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines() if line]
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules and all((ROOT / path).exists() for path in let_in)
    for stage in STAGES:
        for copied in stage.of("COPY"):
            options = [word for word in copied.split() if word.startswith("--")]
            sources = [word for word in copied.split() if not word.startswith("--")][:-1]
            of_stage = [option.partition("=")[2] for option in options if option.startswith("--from=")]
            assert set(of_stage) <= stages
            if not of_stage:
                assert set(sources) <= set(let_in)


@pytest.mark.parametrize(
    "path", [".git/config", "outputs/run/run.json", "data/train.jsonl", ".venv/bin/python"]
)
def test_nothing_else_reaches_the_build(path: str) -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert not any(path == name or fnmatch.fnmatch(path, f"{name}/*") for name in let_in)


def test_the_kernels_of_the_extra_are_compiled_and_then_only_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extra = {Requirement(line).name for line in project["optional-dependencies"]["cuda"]}
    assert set(KERNELS) <= extra
    [compiled] = [rest for rest in BUILD.of("RUN") if "pip wheel" in rest]
    [installed] = [part for part in installs(FINAL) if part.endswith(" ".join(KERNELS))]
    assert compiled.split()[-2:] == KERNELS
    for variable in ("MAMBA_FORCE_BUILD=TRUE", "CAUSAL_CONV1D_FORCE_BUILD=TRUE", "--no-build-isolation"):
        assert variable in compiled
    assert "--no-index --find-links /tmp/wheels" in installed
    assert f"--from={BUILD.name} /tmp/kernels/wheels /tmp/wheels" in FINAL.of("COPY")


def installs(stage: Stage) -> list[str]:
    """Its commands of pip."""
    parts = [part.strip() for rest in stage.of("RUN") for part in rest.split("&&")]
    return [part for part in parts if re.search(r"\bpip (install|wheel)\b", part)]


def test_every_install_is_pinned() -> None:
    """By constraints.txt, by the hashes of requirements.txt, or by what lies there already."""
    commands = [*installs(BUILD), *installs(FINAL)]
    assert len(commands) == 6
    assert all("--no-cache-dir" in command for command in commands)
    pinned = ("-c constraints.txt", "--require-hashes -r requirements.txt", "--no-index")
    free = [command for command in commands if not any(way in command for way in pinned)]
    assert free == ["pip install --no-cache-dir --no-deps ."]
    assert all("--no-deps" in command for command in installs(FINAL))


def locked() -> dict[str, str]:
    """Versions of requirements.txt by name; each has hashes."""
    text = (DOCKER / "requirements.txt").read_text("utf-8").replace(" \\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"(\S+)==(\S+)( +--hash=sha256:[0-9a-f]{64})+", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    return {canonicalize_name(match[1]): match[2] for match in found if match is not None}


def test_the_lock_has_the_tested_versions() -> None:
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    found = locked()
    assert {name: found[name] for name in pins.keys() & found.keys()} == {
        name: version for name, version in pins.items() if name in found
    }


def test_the_lock_has_all_but_torch_and_the_kernels() -> None:
    """What the package, its extra and the clouds name, in the versions that they allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    clouds = [line for line in (DOCKER / "clouds.txt").read_text("utf-8").splitlines() if line[0] != "#"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["cuda"], *clouds]
    wanted = {canonicalize_name(one.name): one for one in map(Requirement, lines)}
    found = locked()
    assert wanted.keys() - found.keys() == {"torch", *KERNELS}
    assert all(one.specifier.contains(found[name]) for name, one in wanted.items() if name in found)
    torch = {canonicalize_name(Requirement(line).name) for line in importlib.metadata.requires("torch") or []}
    assert len(found) > 100 and {"sympy", "networkx"} <= torch & found.keys()


def test_no_compiler_of_cuda_and_no_root_in_what_runs() -> None:
    assert "cu130" not in FINAL.image
    assert not FINAL.of("USER")  # Ray's images end as the user `ray`
    assert "HOME=/home/ray" in FINAL.of("ENV")


def test_the_container_runtime_gives_the_driver() -> None:
    variables = " ".join(FINAL.of("ENV"))
    assert "NVIDIA_VISIBLE_DEVICES=all" in variables
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in variables


def test_folders_that_the_launcher_mounts_into_are_the_users() -> None:
    [made] = [rest for rest in FINAL.of("RUN") if rest.startswith("mkdir -p")]
    assert made.split()[2:] == ["/home/ray/.ray", "/home/ray/.cache"]


# --- the list of GPUs


def _nvcc(tmp_path: Path, archs: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the wrapper with an nvcc that prints its arguments, one a line."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir(exist_ok=True)
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": archs}
    command = [str(DOCKER / "nvcc"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_the_list_reaches_the_compiler() -> None:
    [compiled] = [rest for rest in BUILD.of("RUN") if "pip wheel" in rest]
    copied = [rest.split() for rest in BUILD.of("COPY")]
    [target] = [words[-1] for words in copied if "cluster/docker/nvcc" in words]
    assert f"PYTORCH_NVCC={target}" in compiled
    assert 'TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}"' in compiled
    assert BUILD.args["TORCH_CUDA_ARCH_LIST"] == "8.0 8.9 9.0"  # A100, L40S, H100


def test_torch_takes_another_nvcc() -> None:
    """The variable is torch's own; the wrapper needs it."""
    import torch

    source = Path(torch.__file__).with_name("utils") / "cpp_extension.py"
    assert 'os.getenv("PYTORCH_NVCC")' in source.read_text("utf-8")


def test_the_listed_architectures_take_the_place_of_others(tmp_path: Path) -> None:
    given = ["-O3", "-gencode", "arch=compute_75,code=sm_75", "-gencode=arch=compute_100,code=sm_100"]
    done = _nvcc(tmp_path, "8.0 8.9;9.0", *given, "--threads", "4", "-c", "a b.cu", "-DX='\"1\"'")
    listed = [
        word for arch in ("80", "89", "90") for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")
    ]
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["-O3", "--threads", "4", "-c", "a b.cu", "-DX='\"1\"'", *listed]


@pytest.mark.parametrize("archs", ["90", "Hopper", "9.0+PTX"])
def test_what_is_no_architecture_is_an_error(tmp_path: Path, archs: str) -> None:
    done = _nvcc(tmp_path, archs, "-c", "a.cu")
    assert done.returncode == 2
    assert archs in done.stderr and "9.0" in done.stderr


# --- what Ray needs for the clouds


def test_the_libraries_of_the_clouds_are_pinned() -> None:
    lines = (DOCKER / "clouds.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and "==" in str(pin.specifier) for pin in pins)
    names = {pin.name for pin in pins}
    assert {"boto3", "google-api-python-client", "google-auth-httplib2", "azure-identity"} <= names


def test_ray_imports_what_newer_azure_libraries_lack() -> None:
    """Why azure-mgmt-resource is held back; when this fails, look whether it still must be."""
    source = Path(ray.autoscaler.__file__).parent / "_private" / "_azure" / "node_provider.py"
    assert "from azure.mgmt.resource.resources.models import DeploymentMode" in source.read_text("utf-8")
