"""What a cluster launcher file may say, for what Ray's own check lets through.

Ray's schema leaves `provider` open and does not look into `node_config`, where a misspelt key means a node
without its disk, its role or its spot price. Here every key of every level is known, or the file is refused:
AWS's by the service model of botocore, Azure's by the template that Ray fills in, Google's by the fields of
an instance that these files use. No key is free-form.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import botocore.loaders
import ray.autoscaler
from botocore.model import ServiceModel, Shape
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from ray.util.accelerators import accelerators

TOKEN_FILE = "~/.ray/auth_token"
AUTH = "--env=RAY_AUTH_MODE=token"
GPUS = "--gpus=all"
LOOPBACK = "--dashboard-host=127.0.0.1"

_GPUS = frozenset(value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_"))
_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (float, int),
    "double": (float, int),
    "boolean": (bool,),
}
_SET_BY_RAY = {
    *("vmName", "vmTags", "vmCount", "provisionPublicIp", "zones"),
    *("msi", "nsg", "subnet", "adminUsername", "publicKey"),
}
"""Parameters of Ray's Azure template that its node provider fills in itself."""
_ARM_TYPES = {"string": str, "int": int, "bool": bool, "object": dict}


class Strict(BaseModel):
    """No unknown key, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CamelCase(Strict):
    """The same with keys in Google's spelling."""

    model_config = ConfigDict(alias_generator=to_camel)


class Provider(Strict):
    """Ray's provider of a cloud, and on-demand nodes where it refuses spot."""

    type: Literal["external"]
    module: str

    @property
    def cloud(self) -> str:
        """aws, gcp or azure."""
        return self.module.split(".")[2]


# --- AWS


@cache
def ec2_shape(operation: str) -> Shape:
    """What an operation of EC2 takes, from the model that boto3 sends by."""
    loaded = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    shape = ServiceModel(loaded, "ec2").operation_model(operation).input_shape
    assert shape is not None
    return shape


def check_shape(shape: Shape, value: Any, where: str) -> None:
    """Raises: ValueError where a value does not have the shape that the service takes."""
    if shape.type_name == "structure":
        if not isinstance(value, dict):
            raise ValueError(f"{where}: not a map")
        for key, inner in value.items():
            if key not in shape.members:
                raise ValueError(f"{where}.{key}: EC2 knows no such key")
            check_shape(shape.members[key], inner, f"{where}.{key}")
    elif shape.type_name == "list":
        if not isinstance(value, list):
            raise ValueError(f"{where}: not a list")
        for index, inner in enumerate(value):
            check_shape(shape.member, inner, f"{where}[{index}]")
    else:
        right = _SCALARS[shape.type_name]
        if not isinstance(value, right) or (isinstance(value, bool) and bool not in right):
            raise ValueError(f"{where}: {value!r} is no {shape.type_name}")
        allowed = getattr(shape, "enum", None)
        if allowed and value not in allowed:
            raise ValueError(f"{where}: {value!r} is none of the values that EC2 takes")


def _run_instances(value: Any) -> Any:
    check_shape(ec2_shape("RunInstances"), value, "node_config")
    return value


class SecurityGroup(Strict):
    """A name alone: Ray's own two rules are SSH, and what goes on within the group. More would open more."""

    group_name: str = Field(alias="GroupName")


class AwsProvider(Provider):
    module: Literal["nemo_ray.nodes.aws.Provider"]
    region: str
    availability_zone: str
    cache_stopped_nodes: Literal[False]
    security_group: SecurityGroup

    @model_validator(mode="after")
    def _zones_are_of_the_region(self) -> "AwsProvider":
        if not all(re.fullmatch(rf"{self.region}[a-f]", zone) for zone in self.availability_zone.split(",")):
            raise ValueError(f"availability_zone: not all of region {self.region}")
        return self


# --- Google Cloud: https://cloud.google.com/compute/docs/reference/rest/v1/instances, the fields in use


class DiskParams(CamelCase):
    disk_size_gb: int = Field(ge=10)
    disk_type: str = Field(pattern=r"^zones/[a-z0-9-]+/diskTypes/[a-z-]+$")
    source_image: str = Field(pattern=r"^projects/[a-z0-9-]+/global/images/family/[a-z0-9-]+$")


class Disk(CamelCase):
    boot: Literal[True]
    auto_delete: Literal[True]
    type: Literal["PERSISTENT"]
    initialize_params: DiskParams


class MetadataItem(CamelCase):
    key: str
    value: str


class Metadata(CamelCase):
    items: list[MetadataItem]


class ServiceAccount(CamelCase):
    email: str = Field(pattern=r"^[a-z0-9-]+@[a-z0-9-]+\.iam\.gserviceaccount\.com$")
    scopes: list[str]


class Scheduling(CamelCase):
    on_host_maintenance: Literal["TERMINATE"]
    automatic_restart: Literal[False]
    provisioning_model: Literal["SPOT"] | None = None
    instance_termination_action: Literal["DELETE"] | None = None


class GcpInstance(CamelCase):
    machine_type: str
    disks: list[Disk] = Field(min_length=1)
    metadata: Metadata | None = None
    service_accounts: list[ServiceAccount] | None = None
    scheduling: Scheduling | None = None


class GcpProvider(Provider):
    module: Literal["nemo_ray.nodes.gcp.Provider"]
    region: str
    availability_zone: str
    project_id: str
    cache_stopped_nodes: Literal[False]

    @model_validator(mode="after")
    def _zone_is_of_the_region(self) -> "GcpProvider":
        if not re.fullmatch(rf"{self.region}-[a-f]", self.availability_zone):
            raise ValueError(f"availability_zone: not one of region {self.region}")
        return self


# --- Azure


@cache
def arm_parameters() -> dict[str, dict[str, Any]]:
    """Parameters of the template with which Ray starts a machine, without those that it sets itself."""
    autoscaler = Path(ray.autoscaler.__file__).parent
    template = json.loads((autoscaler / "_private/_azure/azure-vm-template.json").read_text("utf-8"))
    return {name: spec for name, spec in template["parameters"].items() if name not in _SET_BY_RAY}


def _template_parameters(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("not a map")
    known = arm_parameters()
    for key, given in value.items():
        if key == "availability_zone":  # Ray's own; it becomes the parameter `zones`
            right: type = str
        elif key in known:
            right = _ARM_TYPES[known[key]["type"]]
        else:
            raise ValueError(f"{key}: Ray's template has no such parameter")
        if type(given) is not right:
            raise ValueError(f"{key}: {given!r} is no {right.__name__}")
    missing = [key for key, spec in known.items() if "defaultValue" not in spec and key not in value]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, and Ray's template has no default")
    billing = value.get("billingProfile", {})
    if billing.keys() - {"maxPrice"}:
        raise ValueError(f"billingProfile: {billing} has more than maxPrice")
    return value


class AzureInstance(Strict):
    azure_arm_parameters: Annotated[dict[str, Any], BeforeValidator(_template_parameters)]


class AzureProvider(Provider):
    module: Literal["nemo_ray.nodes.azure.Provider"]
    location: str
    resource_group: str
    subscription_id: str
    availability_zone: str
    msi_name: str
    msi_resource_group: str
    cache_stopped_nodes: Literal[False]


# --- What all of them have


class Docker(Strict):
    image: str
    container_name: str
    run_options: list[str]
    worker_run_options: list[str]


class Auth(Strict):
    ssh_user: str


def _resources(value: Any) -> Any:
    for name in value:
        kind = name.partition("accelerator_type:")[2]
        if name not in ("CPU", "GPU") and kind not in _GPUS:
            raise ValueError(f"{name}: neither CPU, GPU nor the kind of a GPU in Ray's names")
    return value


class NodeType(Strict):
    resources: Annotated[dict[str, int], BeforeValidator(_resources)]
    min_workers: Literal[0]
    max_workers: int = Field(ge=0)
    priority: int | None = None
    initialization_commands: list[str] | None = None
    node_config: dict[str, Any]

    @property
    def num_gpus(self) -> int:
        """GPUs of a node."""
        return self.resources.get("GPU", 0)


_NODE_CONFIGS = {
    "aws": _run_instances,
    "gcp": GcpInstance.model_validate,
    "azure": AzureInstance.model_validate,
}
Market = Literal["spot", "on-demand"]


def market(provider: str, node_config: Mapping[str, Any]) -> Market:
    """How a node is paid for, by what its cloud is told."""
    if provider == "aws":
        spot = node_config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    elif provider == "gcp":
        spot = node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"
    else:
        spot = node_config["azure_arm_parameters"].get("priority") == "Spot"
    return "spot" if spot else "on-demand"


class Launcher(Strict):
    """A file in `cluster`."""

    cluster_name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    max_workers: int = Field(ge=1)
    idle_timeout_minutes: int = Field(ge=1, le=60)
    docker: Docker
    provider: Annotated[AwsProvider | GcpProvider | AzureProvider, Field(discriminator="module")]
    auth: Auth
    head_node_type: Literal["head"]
    available_node_types: dict[str, NodeType]
    file_mounts: dict[str, str]
    cluster_synced_files: list[str] = Field(max_length=0)
    initialization_commands: list[str]
    setup_commands: list[str] = Field(max_length=0)
    head_setup_commands: list[str] = Field(max_length=0)
    worker_setup_commands: list[str] = Field(max_length=0)
    head_start_ray_commands: list[str]
    worker_start_ray_commands: list[str]

    @property
    def head(self) -> NodeType:
        """The node that takes jobs."""
        return self.available_node_types["head"]

    @property
    def workers(self) -> dict[str, NodeType]:
        """The other types, by name."""
        return {name: node for name, node in self.available_node_types.items() if name != "head"}

    @model_validator(mode="after")
    def _node_configs_are_what_the_cloud_takes(self) -> "Launcher":
        for name, node in self.available_node_types.items():
            try:
                _NODE_CONFIGS[self.provider.cloud](node.node_config)
            except ValueError as error:
                raise ValueError(f"available_node_types.{name}: {error}") from error
        return self

    @model_validator(mode="after")
    def _head_takes_no_work(self) -> "Launcher":
        if "head" not in self.available_node_types:
            raise ValueError("available_node_types: no head")
        if self.head.resources != {"CPU": 0} or self.head.max_workers != 0:
            raise ValueError("available_node_types.head: more than CPU: 0, or more than one of it")
        return self

    @model_validator(mode="after")
    def _each_gpu_has_a_spot_and_an_on_demand_type(self) -> "Launcher":
        kinds: dict[str, dict[str, NodeType]] = {}
        for name, node in self.workers.items():
            gpu, _, paid = name.partition("-")
            if paid != market(self.provider.cloud, node.node_config):
                raise ValueError(f"available_node_types.{name}: the name does not end as it is paid for")
            named = {key.partition(":")[2].lower() for key in node.resources if ":" in key}
            if node.num_gpus < 1 or named != {gpu} or node.priority is None:
                raise ValueError(f"available_node_types.{name}: needs GPU, accelerator_type and priority")
            if not 1 <= node.max_workers <= self.max_workers:
                raise ValueError(f"available_node_types.{name}.max_workers: not within that of all")
            if not any("nvidia-smi" in command for command in node.initialization_commands or []):
                raise ValueError(f"available_node_types.{name}: does not wait for the driver")
            kinds.setdefault(gpu, {})[paid] = node
        for gpu, of_kind in kinds.items():
            if set(of_kind) != {"spot", "on-demand"}:
                raise ValueError(f"available_node_types: {gpu} lacks its spot or its on-demand type")
            if of_kind["spot"].priority <= of_kind["on-demand"].priority:
                raise ValueError(f"available_node_types: {gpu} on demand comes before spot")
            if of_kind["spot"].resources != of_kind["on-demand"].resources:
                raise ValueError(f"available_node_types: {gpu} differs between spot and on demand")
        if not kinds:
            raise ValueError("available_node_types: no GPUs")
        return self

    @model_validator(mode="after")
    def _containers_of_workers_get_the_gpus(self) -> "Launcher":
        """Else a node without its driver joins, and is taken for one with GPUs."""
        if GPUS not in self.docker.worker_run_options or GPUS in self.docker.run_options:
            raise ValueError(f"docker: {GPUS} is not for workers, or not for them alone")
        return self

    @model_validator(mode="after")
    def _a_token_is_asked_for_everywhere(self) -> "Launcher":
        if AUTH not in self.docker.run_options:
            raise ValueError(f"docker.run_options: {AUTH} is missing")
        if self.file_mounts != {TOKEN_FILE: TOKEN_FILE}:
            raise ValueError(f"file_mounts: not {TOKEN_FILE}, and nothing else")
        return self

    @model_validator(mode="after")
    def _only_the_head_reaches_the_dashboard(self) -> "Launcher":
        started = [command for command in self.head_start_ray_commands if "ray start --head" in command]
        if len(started) != 1 or LOOPBACK not in started[0].split():
            raise ValueError(f"head_start_ray_commands: {LOOPBACK} is missing")
        if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in started[0].split():
            raise ValueError("head_start_ray_commands: without --autoscaling-config no worker is started")
        return self
