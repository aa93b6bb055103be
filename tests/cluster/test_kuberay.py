"""The manifests of KubeRay: every key is one that somebody reads, and the parts fit together.

A key that Kubernetes does not know is dropped there in silence or refused on the cluster, so each one is
checked here, against the schema beside this file or the rule of its map, and misspelled once.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import start

from nemo_ray.config.load import check_raw, read_raw
from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = ("raycluster.yaml", "rayjob.yaml")
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())
START_OPTIONS = {
    option.removeprefix("--") for param in start.params for option in param.opts if option.startswith("--")
}
OF_KUBERAY = {"address", "block", "no-monitor"}
"""Options of `ray start` that KubeRay sets itself."""
KNOWN = {
    "labels": {"app.kubernetes.io/name", "kueue.x-k8s.io/queue-name"},
    "annotations": {"eks.amazonaws.com/role-arn", "kueue.x-k8s.io/elastic-job"},
    "requests": {"cpu", "memory", "nvidia.com/gpu"},
    "limits": {"cpu", "memory", "nvidia.com/gpu"},
    "rayStartParams": START_OPTIONS - OF_KUBERAY,
}
"""Keys of the maps that take any key, by the name of the map."""


def documents(name: str) -> list[Any]:
    """The objects of one file."""
    return list(yaml.safe_load_all((ROOT / "cluster" / "kuberay" / name).read_text()))


def problems(found: list[Any]) -> list[str]:
    """What is wrong with the objects of a file, and between them."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    lines = [error.message for document in found for error in validator.iter_errors(document)]
    if lines:
        return lines  # what follows relies on the shape
    for path, value in walk(found):
        if path and path[-1] in KNOWN and "data" not in path:
            lines += [f"{path}: {key}" for key in value if key not in KNOWN[path[-1]]]
    kinds = {document["kind"]: document for document in found}
    for spec in cluster_specs(found):
        lines += cluster_problems(spec, kinds)
    if "RayJob" in kinds:
        lines += job_problems(kinds["RayJob"]["spec"], kinds["ConfigMap"])
    return lines


def cluster_problems(spec: Any, kinds: Any) -> Iterator[str]:
    """Names of one place that another place must have."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        if pod["serviceAccountName"] != kinds["ServiceAccount"]["metadata"]["name"]:
            yield f"no service account {pod['serviceAccountName']}"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        if volumes.keys() != mounted:
            yield f"volumes {sorted(volumes)}, mounted {sorted(mounted)}"
        for source in (volume["configMap"] for volume in volumes.values() if "configMap" in volume):
            if source["name"] != kinds["ConfigMap"]["metadata"]["name"]:
                yield f"no config map {source['name']}"


def job_problems(spec: Any, config_map: Any) -> Iterator[str]:
    """The file that the entrypoint names is the config map's, and a configuration."""
    *command, file = spec["entrypoint"].split()
    if command != ["python", "-m", "nemo_ray.train"]:
        yield f"entrypoint {spec['entrypoint']}"
    (container,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (folder,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "run"]
    if list(config_map["data"]) != [PurePosixPath(file).relative_to(folder).name]:
        yield f"{file} is none of {list(config_map['data'])}"
    for text in config_map["data"].values():
        try:
            configuration(yaml.safe_load(text))
        except ConfigError as error:
            yield str(error)


def configuration(raw: Any) -> Config:
    """As the command would read it. Raises ConfigError."""
    return check_raw(read_raw(raw), check_paths=False).config


def run_keys() -> dict[str, Any]:
    """The run of the RayJob."""
    (config_map,) = [one for one in documents("rayjob.yaml") if one["kind"] == "ConfigMap"]
    (text,) = config_map["data"].values()
    return dict(yaml.safe_load(text))


def cluster_specs(found: list[Any]) -> list[Any]:
    """The RayClusterSpecs of a file's objects."""
    specs = {"RayCluster": lambda spec: spec, "RayJob": lambda spec: spec["rayClusterSpec"]}
    return [specs[one["kind"]](one["spec"]) for one in found if one["kind"] in specs]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every mapping below `value`, with the way there."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))


def keys() -> Iterator[Any]:
    """Every key of every file: file, way there, key."""
    for name in FILES:
        for path, mapping in walk(documents(name)):
            for key in mapping:
                yield pytest.param(name, path, key, id=f"{name}:{'.'.join(map(str, (*path, key)))}")


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_is_right(name: str) -> None:
    assert problems(documents(name)) == []


@pytest.mark.parametrize(("name", "path", "key"), list(keys()))
def test_a_misspelled_key_is_found(name: str, path: tuple[Any, ...], key: str) -> None:
    changed = documents(name)
    misspell(changed, path, key)
    assert problems(changed), f"{key}x passes"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (path, key)
        for path, one in walk(run_keys())
        if path[-1:] != ("resources_per_worker",)  # a resource may have any name
        for key in one
    ],
)
def test_a_misspelled_key_of_the_run_is_found(path: tuple[Any, ...], key: str) -> None:
    changed = run_keys()
    misspell(changed, path, key)
    with pytest.raises(ConfigError, match=f"{key}x"):
        configuration(changed)


def misspell(value: Any, path: tuple[Any, ...], key: str) -> None:
    """Put an x behind a key of the mapping at `path`."""
    for step in path:
        value = value[step]
    value[f"{key}x"] = value.pop(key)


@pytest.mark.parametrize("name", FILES)
def test_the_head_gets_no_work_and_the_gpus_come_from_zero(name: str) -> None:
    (spec,) = cluster_specs(documents(name))
    head, (group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in str(head["template"])
    assert spec["enableInTreeAutoscaling"] and group["replicas"] == group["minReplicas"] == 0
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == worker["resources"]["requests"], "Ray counts what is there"
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert group["rayStartParams"] == {}, "Ray counts by the limits"


@pytest.mark.parametrize("name", FILES)
def test_every_pod_has_shared_memory_within_its_limit(name: str) -> None:
    (spec,) = cluster_specs(documents(name))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (volume,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (memory,) = [one["emptyDir"] for one in pod["volumes"] if one["name"] == volume]
        assert memory["medium"] == "Memory"
        limit = container["resources"]["limits"]["memory"]
        assert int(memory["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi"))


@pytest.mark.parametrize("name", FILES)
def test_a_token_is_asked_for_and_none_is_written_down(name: str) -> None:
    (spec,) = cluster_specs(documents(name))
    assert spec["authOptions"] == {"mode": "token"}
    for _, mapping in walk(documents(name)):
        if mapping.get("name") in ("HF_TOKEN", "RAY_AUTH_TOKEN"):
            assert "value" not in mapping, "secrets come from secrets"


def test_the_version_is_the_tested_one() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (tested,) = [line.partition("==")[2] for line in lines if line.startswith("ray==")]
    assert {spec["rayVersion"] for name in FILES for spec in cluster_specs(documents(name))} == {tested}


def test_a_run_fits_its_cluster() -> None:
    (job,) = [one for one in documents("rayjob.yaml") if one["kind"] == "RayJob"]
    ray = configuration(run_keys()).ray
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert isinstance(ray.num_workers, tuple) and ray.num_workers[1] <= group["maxReplicas"]
    assert ray.resources_per_worker["CPU"] + 1 <= int(worker["resources"]["limits"]["cpu"]), "data needs one"
    assert ray.use_gpu and ray.wait_for_nodes_s > 0, "there are no GPUs when it begins"


def test_kueue_may_hold_a_run_back() -> None:
    (job,) = [one for one in documents("rayjob.yaml") if one["kind"] == "RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["suspend"] is False, "it would wait for ever where there is no Kueue"
    assert job["spec"]["shutdownAfterJobFinishes"] is True and "clusterSelector" not in job["spec"]
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & job["spec"].keys(), (
        "with any of them Ray would start the driver on a worker"
    )
