"""What a configuration names: the base model, the datasets, the folders that a run writes to."""

import os
from collections.abc import Mapping

from nemo_ray import hub
from nemo_ray.config.checks import is_hub_dataset, path_errors
from nemo_ray.config.schema import Config, DatasetSpec
from nemo_ray.data.entries import files_of
from nemo_ray.data.splits import parse_split
from nemo_ray.doctor.findings import Finding, from_line, ok, warning
from nemo_ray.errors import NemoRayError
from nemo_ray.storage import join, publish_bytes, read_bytes, remove
from nemo_ray.urls import is_url

PROBE = b"nemo-ray doctor"


def folders_of(config: Config) -> dict[str, str]:
    """Where a run writes, by the configuration's key; may be URLs."""
    found = {"output_dir": config.output_dir}
    if config.dataset_prepared_path is not None:
        found["dataset_prepared_path"] = config.dataset_prepared_path
    return found


def examine(config: Config, environ: Mapping[str, str]) -> list[Finding]:
    """Whether all that the configuration names is there, and may be read and written."""
    missing = [from_line(line.partition(":")[0], line.partition(": ")[2]) for line in path_errors(config)]
    found = [judge_base(config)] if not any(one.subject == "base_model" for one in missing) else []
    for name, specs in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for number, spec in enumerate(specs):
            if not any(one.subject.startswith(f"{name}.{number}.") for one in missing):
                found.append(judge_dataset(spec, f"{name}[{number}]", name == "test_datasets"))
    stores = {key: folder for key, folder in folders_of(config).items() if is_url(folder)}
    found += [judge_store(key, url) for key, url in stores.items()]
    specs = (*config.datasets, *config.test_datasets)
    if hub.is_reference(hub.reference(config)) or any(is_hub_dataset(spec.path) for spec in specs):
        found.append(judge_token(environ))
    return [*missing, *found]


def judge_base(config: Config) -> Finding:
    """The base model: a folder, or a repository of the hub whose small files are fetched."""
    try:
        hub.pin(config, weights=not config.reinit_weights, here=True)
    except NemoRayError as refused:
        return from_line("base_model", str(refused))
    return ok("base_model", config.base_model)


def judge_dataset(spec: DatasetSpec, key: str, evaluating: bool) -> Finding:
    """A dataset's files; of the hub's, the first byte is asked for and nothing is downloaded."""
    try:
        spec = spec.model_copy(update={"streaming": True})
        files = files_of(spec, parse_split(spec.split, key), key, evaluating, lambda text: None)
    except NemoRayError as refused:
        return from_line(key, str(refused))
    return ok(key, f"{spec.path}: {len(files)} file{'s' if len(files) != 1 else ''}")


def judge_store(key: str, url: str) -> Finding:
    """A folder of an object store: an object is written, read and removed."""
    place = join(url, f".nemo-ray-doctor-{os.getpid()}")
    try:
        publish_bytes(place, PROBE)
        same = read_bytes(place) == PROBE
        remove(place)
    except OSError as refused:
        return from_line(key, str(refused))
    if not same:
        return from_line(key, f"{url} does not give back what was written; is something caching it?")
    return ok(key, f"{url}: written, read and removed")


def judge_token(environ: Mapping[str, str]) -> Finding:
    """Whether a token for the hub is known; public models need none."""
    from huggingface_hub import get_token

    if environ.get("HF_TOKEN"):
        return ok("HF_TOKEN", "set, and passed on to every node")
    if get_token() is not None:
        return ok("HF_TOKEN", "this machine is logged in to the hub; other nodes are only given HF_TOKEN")
    return warning(
        "HF_TOKEN", "not set: gated models and datasets cannot be read", "set HF_TOKEN where one is needed"
    )
