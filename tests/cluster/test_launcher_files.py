"""The launcher files of the clouds: what Ray and the clouds take, and what Ray's autoscaler makes of them."""

import copy
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from pydantic import ValidationError
from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, InstanceReconcileConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent, NodeKind

from nemo_ray.submit.__main__ import load, parser
from tests.cluster.launcher_rules import (
    TOKEN_FILE,
    Launcher,
    arm_parameters,
    check_shape,
    ec2_shape,
    market,
)

ROOT = Path(__file__).parents[2]
NAMES = ["aws-h100", "aws-a100", "aws-l40s", "gcp-h100", "gcp-a100", "azure-h100"]
STORES = {"aws": "s3://", "gcp": "gs://", "azure": "abfs://"}
INSTANCES = {
    "aws-h100": ("p5.48xlarge", 192, 8),
    "aws-a100": ("p4d.24xlarge", 96, 8),
    "aws-l40s": ("g6e.12xlarge", 48, 4),
    "gcp-h100": ("a3-highgpu-8g", 208, 8),
    "gcp-a100": ("a2-ultragpu-8g", 96, 8),
    "azure-h100": ("Standard_ND96isr_H100_v5", 96, 8),
}
"""What a GPU node is, and the vCPUs and GPUs that its cloud publishes for it."""


def _file(name: str) -> Path:
    return ROOT / "cluster" / f"{name}.yaml"


def _raw(name: str) -> dict[str, Any]:
    """As Ray reads it, but with no part shared between anchors, so that one place can be changed alone."""

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(inner) for key, inner in value.items()}
        return [own(inner) for inner in value] if isinstance(value, list) else value

    return own(yaml.safe_load(_file(name).read_text("utf-8")))


def _launcher(name: str) -> Launcher:
    return Launcher.model_validate(_raw(name))


RAW = {name: _raw(name) for name in NAMES}


def _keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each key at each level."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        if isinstance(value, dict):
            yield (*path, key)
        yield from _keys(below, (*path, key))


def _misspelt(raw: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy whose key at `path` ends with an x more, in its old place."""
    changed = copy.deepcopy(raw)
    parent = changed
    for step in path[:-1]:
        parent = parent[step]
    items = list(parent.items())
    parent.clear()
    parent.update({f"{key}x" if key == path[-1] else key: value for key, value in items})
    return changed


EVERY_KEY = [
    pytest.param(name, path, id=f"{name}:{'.'.join(map(str, path))}")
    for name in NAMES
    for path in _keys(RAW[name])
]


# --- what is accepted


def test_these_are_all_the_files() -> None:
    assert sorted(NAMES) == sorted(file.stem for file in (ROOT / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(copy.deepcopy(RAW[name])))


@pytest.mark.parametrize("name", NAMES)
def test_our_rules_accept_the_file(name: str) -> None:
    _launcher(name)


def test_keys_of_all_levels_are_misspelt() -> None:
    paths = [param.values for param in EVERY_KEY]
    assert ("aws-h100", ("provider", "security_group", "GroupName")) in paths
    deep = ("available_node_types", "h100-spot", "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize")
    assert ("aws-h100", deep) in paths
    assert len(paths) > 400


@pytest.mark.parametrize(("name", "path"), EVERY_KEY)
def test_a_misspelt_key_is_refused(name: str, path: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError):
        Launcher.model_validate(_misspelt(RAW[name], path))


def test_ray_alone_accepts_misspelt_keys_of_a_node() -> None:
    """Why there are rules of our own; when this fails, some of them may go."""
    path = ("available_node_types", "h100-spot", "node_config", "InstanceMarketOptions")
    validate_config(prepare_config(_misspelt(RAW["aws-h100"], path)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"InstanceType": 5}, "no string"),
        ({"InstanceType": "p5.49xlarge"}, "none of the values"),
        ({"EbsOptimized": "yes"}, "no boolean"),
        ({"MinCount": True}, "no integer"),
        ({"BlockDeviceMappings": {}}, "not a list"),
        ({"IamInstanceProfile": "nemo-ray-head"}, "not a map"),
        ({"InstanceMarketOptions": {"MarketType": "Spot"}}, "none of the values"),
    ],
)
def test_values_that_ec2_would_refuse(value: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_shape(ec2_shape("RunInstances"), value, "node_config")


def _changed(name: str, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(RAW[name])
    parent: Any = changed
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    return changed


_TYPES = "available_node_types"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("aws-h100", (_TYPES, "head", "resources", "CPU"), 8),
        ("aws-h100", (_TYPES, "head", "resources", "GPU"), 1),
        ("aws-h100", (_TYPES, "head", "max_workers"), 1),
        ("aws-h100", (_TYPES, "h100-spot", "min_workers"), 1),
        ("aws-h100", (_TYPES, "h100-spot", "max_workers"), 3),
        ("aws-h100", (_TYPES, "h100-spot", "priority"), 0),
        ("aws-h100", (_TYPES, "h100-spot", "resources", "accelerator_type:H200"), 1),
        ("aws-h100", (_TYPES, "h100-spot", "initialization_commands"), []),
        ("aws-h100", (_TYPES, "h100-spot", "node_config", "InstanceMarketOptions"), {}),
        (
            "aws-h100",
            (_TYPES, "h100-on-demand", "node_config", "InstanceMarketOptions"),
            {"MarketType": "spot"},
        ),
        ("aws-h100", ("provider", "availability_zone"), "us-east-1a,us-west-2a"),
        ("aws-h100", ("provider", "cache_stopped_nodes"), True),
        ("aws-h100", ("docker", "run_options"), ["--env=RAY_AUTH_MODE=disabled"]),
        ("aws-h100", ("docker", "worker_run_options"), []),
        ("aws-h100", ("file_mounts",), {}),
        ("aws-h100", ("setup_commands",), ["pip install ray"]),
        ("aws-h100", ("head_start_ray_commands",), ["ray start --head --dashboard-host=0.0.0.0"]),
        ("gcp-h100", ("provider", "availability_zone"), "us-west1-a"),
        ("gcp-h100", (_TYPES, "h100-spot", "node_config", "scheduling", "provisioningModel"), "spot"),
        ("gcp-h100", (_TYPES, "h100-spot", "node_config", "disks", 0, "autoDelete"), False),
        ("azure-h100", (_TYPES, "h100-spot", "node_config", "azure_arm_parameters", "priority"), "spot"),
        ("azure-h100", (_TYPES, "head", "node_config", "azure_arm_parameters", "osDiskSize"), "256"),
        ("azure-h100", (_TYPES, "head", "node_config", "azure_arm_parameters"), {}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_values_that_our_rules_refuse(name: str, path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValidationError):
        Launcher.model_validate(_changed(name, path, value))


def test_the_rules_know_rays_template() -> None:
    assert {"vmSize", "osDiskSize", "priority", "billingProfile"} <= arm_parameters().keys()
    assert not {"vmName", "publicKey", "msi"} & arm_parameters().keys()


# --- what the files say


@pytest.mark.parametrize("name", NAMES)
def test_gpu_nodes_are_the_machines_of_the_clouds(name: str) -> None:
    """Ray looks up what a machine has on AWS only, and starts from zero by what stands here."""
    machine, cpus, gpus = INSTANCES[name]
    kind = name.partition("-")[2].upper()
    for node in _launcher(name).workers.values():
        assert node.resources == {"CPU": cpus, "GPU": gpus, f"accelerator_type:{kind}": 1}
        assert machine in str(node.node_config)


@pytest.mark.parametrize("name", NAMES)
def test_spot_and_on_demand_differ_only_in_how_they_are_paid_for(name: str) -> None:
    launcher = _launcher(name)
    provider = launcher.provider.cloud
    assert {market(provider, node.node_config) for node in launcher.workers.values()} == {"spot", "on-demand"}
    assert market(provider, launcher.head.node_config) == "on-demand"
    market_keys = {"InstanceMarketOptions", "scheduling", "priority", "evictionPolicy", "billingProfile"}

    def machine(node_config: dict[str, Any]) -> dict[str, Any]:
        flat = node_config.get("azure_arm_parameters", node_config)
        return {key: value for key, value in flat.items() if key not in market_keys}

    first, second = (machine(node.node_config) for node in launcher.workers.values())
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_workers_may_use_the_bucket(name: str) -> None:
    """Each cloud's way to give a node an identity."""
    launcher = _launcher(name)
    if launcher.provider.cloud == "azure":
        assert launcher.provider.msi_resource_group == launcher.provider.resource_group
        return
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[launcher.provider.cloud]
    head = launcher.head.node_config.get(key)
    for node in launcher.workers.values():
        assert "nemo-ray-worker" in str(node.node_config[key])
        assert node.node_config[key] != head  # the head may start machines, workers may not


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("aws")])
def test_the_region_of_the_bucket_is_that_of_the_nodes(name: str) -> None:
    launcher = _launcher(name)
    assert f"--env=AWS_REGION={launcher.provider.region}" in launcher.docker.run_options


@pytest.mark.parametrize("name", NAMES)
def test_disks_hold_the_image_the_weights_and_what_is_written(name: str) -> None:
    for node in _launcher(name).workers.values():
        sizes = re.findall(r"'(?:VolumeSize|diskSizeGb|osDiskSize)': (\d+)", str(node.node_config))
        assert [int(size) >= 400 for size in sizes] == [True]


@pytest.mark.parametrize("name", NAMES)
def test_volumes_are_made_for_the_user_of_the_image(name: str) -> None:
    """Docker gives a folder that it has to make to root."""
    launcher = _launcher(name)
    volumes = [option.partition("=")[2] for option in launcher.docker.run_options if "--volume" in option]
    for volume in volumes:
        command = f"sudo install -d -o 1000 -g 100 {volume.partition(':')[0]}"
        for commands in (
            launcher.initialization_commands,
            *(node.initialization_commands or [] for node in launcher.workers.values()),
        ):
            assert command in commands


@pytest.mark.parametrize("name", NAMES)
def test_the_image_carries_rays_version(name: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert _launcher(name).docker.image.endswith(f"/nemo-ray:{pinned[1]}")


@pytest.mark.parametrize("name", NAMES)
def test_names_may_be_labels_of_google_cloud(name: str) -> None:
    """Ray labels machines with the names of their types."""
    for node_type in RAW[name]["available_node_types"]:
        assert re.fullmatch(r"[a-z0-9_-]{1,63}", node_type)


def test_the_token_is_where_ray_looks_for_it() -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    assert _get_default_token_path() == Path(TOKEN_FILE).expanduser()


# --- what Ray asks AWS for


@pytest.fixture
def clouds_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key into .ssh
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "of-a-test")


def _known(node_config: dict[str, Any]) -> dict[str, Any]:
    """Without what the stand-in for AWS has not: an image and a profile."""
    known = {**node_config, "ImageId": "ami-1"}
    del known["IamInstanceProfile"]
    return known


@pytest.mark.usefixtures("clouds_keys")
def test_ray_sets_up_aws_by_the_files() -> None:
    """Ray's own steps of `ray up` and of a scale-up, on a stand-in for AWS."""
    files = [name for name in NAMES if name.startswith("aws")]
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-east-1")
        looked_up: dict[str, Any] = {}
        for name in files:
            config = _get_node_provider_cls(RAW[name]["provider"]).bootstrap_config(
                prepare_config(copy.deepcopy(RAW[name]))
            )

            group = config["provider"]["security_group"]["GroupName"]
            [made] = ec2.describe_security_groups(GroupNames=[group])["SecurityGroups"]
            open_to_all = [rule for rule in made["IpPermissions"] if rule["IpRanges"]]
            assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]

            provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
            for node_type, node in config["available_node_types"].items():
                tags = {"ray-node-type": "worker", "ray-node-name": "a", "ray-user-node-type": node_type}
                assert len(provider.create_node(_known(node["node_config"]), tags, 1)) == 1
                looked_up[node_type] = {"node_config": node["node_config"]}

        together = {**config, "available_node_types": looked_up}
        seen = provider.fillout_available_node_types_resources(together)["available_node_types"]
    for name in files:
        for node_type, node in _launcher(name).workers.items():
            del seen[node_type]["resources"]["memory"]
            assert seen[node_type]["resources"] == node.resources


@pytest.mark.usefixtures("clouds_keys")
def test_rays_autoscaler_gets_an_on_demand_node_where_aws_refuses_spot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through what Ray's autoscaler launches by, up to the instance that EC2 has."""
    refused: list[str] = []
    with mock_aws():
        raw = RAW["aws-h100"]
        config = _get_node_provider_cls(raw["provider"]).bootstrap_config(prepare_config(copy.deepcopy(raw)))
        for node in config["available_node_types"].values():
            node["node_config"] = _known(node["node_config"])
        provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
        create = provider.ec2_fail_fast.create_instances

        def without_spot(**asked: Any) -> Any:
            if "InstanceMarketOptions" in asked:
                refused.append(asked["SubnetId"])
                error = {"Code": "InsufficientInstanceCapacity", "Message": "There is no Spot capacity"}
                raise ClientError({"Error": error}, "RunInstances")
            return create(**asked)

        monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", without_spot)
        adapter = NodeProviderAdapter(provider, _Reader(AutoscalingConfig(config, skip_content_hash=True)))
        adapter.launch({"h100-spot": 2}, "asked-1")
        deadline_s = time.monotonic() + 60
        while len(found := adapter.get_non_terminated()) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert adapter.poll_errors() == []
        assert [(node.node_type, node.request_id) for node in found.values()] == [
            ("h100-spot", "asked-1")
        ] * 2
        ec2 = boto3.client("ec2", region_name="us-east-1")
        [*reservations] = ec2.describe_instances(InstanceIds=list(found))["Reservations"]
        instances = [instance for reservation in reservations for instance in reservation["Instances"]]
    assert [instance.get("InstanceLifecycle") for instance in instances] == [None, None]
    assert len(set(refused)) > 1  # in every zone of the file


class _Reader:
    """The configuration of an autoscaler, which does not change."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config

    def get_cached_autoscaling_config(self) -> AutoscalingConfig:
        return self._config


# --- what Ray's autoscaler makes of them


def _plan(
    name: str, bundles: list[dict[str, float]], availability: dict[str, float] | None = None, **changes: Any
) -> tuple[dict[str, int], int]:
    """Nodes that Ray would start where only the head runs, and how many of the bundles fit nowhere.

    availability: of a type, as Ray has seen it; 1 where it has not failed.
    changes: max_workers of a type.
    """
    raw = copy.deepcopy(RAW[name])
    for node_type, max_workers in changes.items():
        raw["available_node_types"][node_type]["max_workers"] = max_workers
    return _schedule(raw, bundles, availability or {})


def _schedule(
    raw: dict[str, Any], bundles: list[dict[str, float]], availability: dict[str, float]
) -> tuple[dict[str, int], int]:
    config = AutoscalingConfig(raw, skip_content_hash=True)
    head = Instance(
        instance_id="head",
        instance_type="head",
        status=Instance.RAY_RUNNING,
        cloud_instance_id="c-head",
        node_kind=NodeKind.HEAD,
    )
    has = {name: float(amount) for name, amount in raw["available_node_types"]["head"]["resources"].items()}
    node = NodeState(
        node_id=b"head",
        instance_id="c-head",
        ray_node_type_name="head",
        status=NodeStatus.RUNNING,
        total_resources=has,
        available_resources=has,
    )
    running = AutoscalerInstance(im_instance=head, ray_node=node, cloud_instance_id="c-head")
    requests = [ResourceRequestUtil.make(bundle) for bundle in bundles]
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            current_instances=[running],
            recoverable_resource_availabilities=availability,
        )
    )
    launched = {request.instance_type: request.count for request in reply.to_launch}
    return launched, len(reply.infeasible_resource_requests)


def _names(name: str) -> tuple[str, str]:
    gpu = name.partition("-")[2]
    return f"{gpu}-spot", f"{gpu}-on-demand"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_started_without_a_demand(name: str) -> None:
    assert _plan(name, []) == ({}, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_starts_one_spot_node(name: str) -> None:
    spot, _ = _names(name)
    gpus = INSTANCES[name][2]
    kind = name.partition("-")[2].upper()
    assert _plan(name, [{"CPU": 1, "GPU": 1}] * gpus) == ({spot: 1}, 0)
    typed = {"CPU": 1, "GPU": 1, f"accelerator_type:{kind}": 0.001}
    assert _plan(name, [typed] * gpus) == ({spot: 1}, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_gets_no_data_task_either(name: str) -> None:
    spot, _ = _names(name)
    assert _plan(name, [{"CPU": 1}]) == ({spot: 1}, 0)
    with_cpus = _changed(name, (_TYPES, "head", "resources", "CPU"), 8)
    assert _schedule(with_cpus, [{"CPU": 1}], {}) == ({}, 0)  # what the rules refuse


@pytest.mark.parametrize("name", NAMES)
def test_on_demand_where_spot_is_used_up_or_has_failed(name: str) -> None:
    spot, on_demand = _names(name)
    gpus = INSTANCES[name][2]
    bundles = [{"CPU": 1, "GPU": 1}] * (2 * gpus)
    assert _plan(name, bundles, **{spot: 1}) == ({spot: 1, on_demand: 1}, 0)
    assert _plan(name, bundles, **{spot: 0}) == ({on_demand: 2}, 0)
    assert _plan(name, bundles, {spot: 0.5}) == ({on_demand: 2}, 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_more_nodes_than_max_workers_of_both_types(name: str) -> None:
    launched, _ = _plan(name, [{"CPU": 1, "GPU": 1}] * 100)
    assert sum(launched.values()) == RAW[name]["max_workers"]


def test_ray_alone_repeats_a_refused_request() -> None:
    """Why the files name providers of our own; when this fails, Ray's may do."""

    def availability(status: Instance.InstanceStatus) -> dict[str, float]:
        monitor = CloudResourceMonitor()
        monitor.notify([InstanceUpdateEvent(new_instance_status=status, instance_type="h100-spot")])
        return monitor.get_recoverable_resource_availabilities()

    assert availability(Instance.ALLOCATION_FAILED) == {}
    assert availability(Instance.ALLOCATION_TIMEOUT) == {"h100-spot": 0.0}
    assert InstanceReconcileConfig().allocate_status_timeout_s == 3600


def test_a_type_that_failed_is_first_again_after_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = CloudResourceMonitor()
    event = InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_TIMEOUT, instance_type="h100-spot")
    monitor.notify([event])
    began_s = time.time()
    for passed_s, last in ((300, True), (590, True), (610, False)):
        monkeypatch.setattr(time, "time", lambda now_s=began_s + passed_s: now_s)
        assert (monitor.get_recoverable_resource_availabilities()["h100-spot"] < 1) == last


# --- the comments above


def _header(name: str) -> str:
    """The comments before the first key."""
    lines = _file(name).read_text("utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index(f"cluster_name: {RAW[name]['cluster_name']}")])


def _commands(text: str) -> list[list[str]]:
    """Commands of a comment, those over several lines joined, by word."""
    plain = re.sub(r" \\\n# +", " ", text)
    commands = r"^# {3}((?:\w+=\w+ )?(?:ray|nemo-ray|python -m nemo_ray\S*) .+)$"
    return [shlex.split(command) for command in re.findall(commands, plain, re.MULTILINE)]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_it_costs_and_needs(name: str) -> None:
    header = _header(name)
    assert INSTANCES[name][0] in header.splitlines()[0]
    cost = header[header.index("# Cost, in USD an hour") : header.index("# Needed first:")]
    assert re.search(r"20\d\d", cost) and "change" in cost
    assert "head" in cost and "on demand" in cost and "spot" in cost
    needed = header[header.index("# Needed first:") : header.index("# Use")].lower()
    for word in (
        "quota",
        "token",
        "bucket|container",
        "cluster/docker/dockerfile",
        "cluster/docker/clouds.txt",
    ):
        assert re.search(word, needed), word


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_the_commands(name: str) -> None:
    file = f"cluster/{name}.yaml"
    up, dashboard, submit, down = _commands(_header(name))
    assert up == ["ray", "up", "-y", file]
    assert dashboard == ["ray", "dashboard", file]
    assert down == ["ray", "down", "-y", file]
    assert submit[:3] == ["RAY_AUTH_MODE=token", "nemo-ray", "submit"]


@pytest.mark.parametrize("name", NAMES)
def test_the_submit_command_is_a_run_that_fits_the_cluster(name: str) -> None:
    [words] = [words for words in _commands(_header(name)) if "submit" in words]
    given = parser().parse_intermixed_args(words[words.index("submit") + 1 :])
    assert (ROOT / given.config).is_file()
    module, config = load(str(ROOT / given.config), given.overrides)
    launcher = _launcher(name)
    store = STORES[launcher.provider.cloud]
    assert module == "train"
    assert given.address == "http://127.0.0.1:8265"
    assert str(config.output_dir).startswith(store) and str(config.dataset_prepared_path).startswith(store)
    assert config.ray.num_workers in [node.num_gpus for node in launcher.workers.values()]
    assert config.ray.use_gpu and config.ray.wait_for_nodes_s >= 900
    assert config.resume_from_checkpoint == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_launcher_file_names_exist(name: str) -> None:
    text = _file(name).read_text("utf-8")
    named = re.findall(r"\b(?:configs|cluster|docs)/[\w./-]*\w", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]
