"""Rules between keys, what this version cannot do yet, and the paths that a configuration names.

Each function returns one line per problem, with key, value, rule and remedy; it raises nothing.
"""

import glob
import json
import os
import re
from collections.abc import Iterator

from nemo_ray.config.dataset_checks import format_notices, format_rules, template_path_errors
from nemo_ray.config.evaluation_checks import (
    evaluation_notices,
    evaluation_rules,
    tracker_notices,
    tracker_rules,
)
from nemo_ray.config.kinds import MOST_TOKENS
from nemo_ray.config.schema import AdapterSection, Config, DatasetSpec
from nemo_ray.config.translate import show
from nemo_ray.urls import is_url, parse, redact, url_problem

_SPLIT = re.compile(r"[A-Za-z_][\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DATA_FILE = re.compile(
    r".*\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt)(\.(gz|zst|bz2|lz4))?", re.IGNORECASE
)
_TOKENS = ("pad_token", "eos_token", "bos_token", "unk_token")
_SAVED_MODULES = ("lm_head", "embeddings")
_TARGET_KEYS = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")


def rule_errors(config: Config, adapter_named: bool) -> list[str]:
    """What contradicts itself, whatever the version.

    adapter_named: the YAML has the key `adapter`, even without a value.
    """
    return [
        *_adapter_rules(config, adapter_named),
        *_schedule_rules(config),
        *evaluation_rules(config),
        *tracker_rules(config),
        *_data_rules(config),
        *_cluster_rules(config),
    ]


def _lora_keys_given(config: Config) -> list[str]:
    return [name for name in AdapterSection.model_fields if name != "adapter" and _given(config, name)]


def _given(config: Config, name: str) -> bool:
    return name in config.model_fields_set and getattr(config, name) not in ((), {}, False, None)


def _adapter_rules(config: Config, adapter_named: bool) -> Iterator[str]:
    if config.adapter is None:
        given = _lora_keys_given(config)
        if given and not adapter_named:
            yield (
                f"adapter: missing, but {', '.join(given)} is given; add `adapter: lora`, or `adapter: "
                "none` to train every weight"
            )
        if config.load_in_4bit:
            yield (
                "load_in_4bit: true needs `adapter: qlora`, since 4-bit weights cannot be trained; "
                "set one of the two"
            )
    elif not any(getattr(config, name) for name in _TARGET_KEYS):
        yield (
            f"adapter: {config.adapter} has nothing to train; name targets in {', '.join(_TARGET_KEYS)}, "
            "such as `lora_target_modules: [q_proj, k_proj, v_proj, o_proj]`"
        )
    if config.adapter == "qlora" and not config.load_in_4bit:
        yield "adapter: qlora needs `load_in_4bit: true`; set it, or use `adapter: lora`"
    if config.adapter == "lora" and config.load_in_4bit:
        yield "load_in_4bit: true needs `adapter: qlora`; set it, or remove load_in_4bit"
    if config.quantize_moe_experts and not config.load_in_4bit:
        yield "quantize_moe_experts: true needs `load_in_4bit: true`; set it, or remove quantize_moe_experts"
    if config.adapter and config.lora_dropout and config.lora_target_parameters:
        yield (
            f"lora_dropout: {config.lora_dropout} cannot go with lora_target_parameters, since a "
            "parameter's LoRA is added to the weight, where there is no input to drop; set lora_dropout: 0"
        )
    for name in config.lora_modules_to_save if config.adapter else ():
        if name not in _SAVED_MODULES:
            yield (
                f"lora_modules_to_save: {show(name)} cannot be trained whole beside a LoRA; name "
                f"{' or '.join(_SAVED_MODULES)} (linear layers take a LoRA by lora_target_modules; norms, "
                "the router and Mamba's other parameters train in a full fine-tune only)"
            )


def _schedule_rules(config: Config) -> Iterator[str]:
    for first, second in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if getattr(config, first) is not None and getattr(config, second) is not None:
            yield (
                f"{first}: {getattr(config, first)} and {second}: {getattr(config, second)} both say how "
                f"often; keep one (`{first}=` on the command line removes it)"
            )
    if config.warmup_steps is not None and config.warmup_ratio:
        yield (
            f"warmup_steps: {config.warmup_steps} and warmup_ratio: {config.warmup_ratio} both say how "
            "long; keep one"
        )
    if config.lr_scheduler == "constant" and (config.warmup_steps or config.warmup_ratio):
        yield "lr_scheduler: constant has no warmup; use constant_with_warmup, or remove the warmup"


def _data_rules(config: Config) -> Iterator[str]:
    if config.val_set_size and config.test_datasets:
        yield (
            f"val_set_size: {config.val_set_size} and test_datasets both say what is held out; keep one "
            "(val_set_size: 0)"
        )
    if config.micro_batch_size * config.sequence_len > MOST_TOKENS:
        yield (
            f"micro_batch_size: {show(config.micro_batch_size)} packs of sequence_len: {config.sequence_len} "
            f"are more than {MOST_TOKENS} tokens, which a GPU cannot number in a forward pass; make one of "
            "the two smaller"
        )
    for token in config.special_tokens:
        if token not in _TOKENS:
            yield f"special_tokens.{token}: cannot be set here; only {', '.join(_TOKENS)} can"
    weights = [spec.weight for spec in config.datasets]
    if None in weights and any(weight is not None for weight in weights):
        yield (
            f"datasets.{weights.index(None)}.weight: missing, but other datasets have one; give it to all of "
            "them or to none"
        )
    for spec in config.test_datasets:
        if spec.weight is not None:
            yield f"test_datasets.weight: {show(spec.weight)} means nothing in evaluation; remove it"
    for key, spec in _specs(config):
        if spec.split is not None and not _SPLIT.fullmatch(spec.split.replace(" ", "")):
            yield (
                f"{key}.split: {show(spec.split)} is not a slice; write train, train[:20%] or train[100:200]"
            )
        if spec.shards is None and spec.shards_idx:
            yield f"{key}.shards_idx: {spec.shards_idx} needs shards; say of how many parts it is one"
        if spec.shards is not None and spec.shards_idx >= spec.shards:
            yield (
                f"{key}.shards_idx: {spec.shards_idx} is no part of shards: {spec.shards}; give a number "
                f"below {spec.shards}"
            )

    yield from format_rules(config)


def _cluster_rules(config: Config) -> Iterator[str]:
    sizes = {"dp_shard_size": config.dp_shard_size, "dp_replicate_size": config.dp_replicate_size}
    given = {name: size for name, size in sizes.items() if size is not None}
    workers = config.ray.num_workers
    if isinstance(workers, tuple):
        if given:
            yield (
                f"{next(iter(given))} needs a fixed number of workers, and ray.num_workers is "
                f"{list(workers)}; remove one of them"
            )
        if config.optimizer == "adamw_8bit":
            yield (
                "optimizer: adamw_8bit has states that fit one number of workers, and ray.num_workers is "
                f"{list(workers)}; set one number, or optimizer: adamw_torch"
            )
    elif workers is not None and given:
        product = 1
        for size in given.values():
            product *= size
        terms = " x ".join(f"{name}: {size}" for name, size in given.items())
        if len(given) == 2 and product != workers:
            yield f"{terms} = {product} is not ray.num_workers: {workers}; make them equal"
        elif workers % product:
            yield f"{terms} does not divide ray.num_workers: {workers}; choose a divisor"
    wants_gpu = config.ray.accelerator_type or config.ray.resources_per_worker.get("GPU")
    if config.ray.use_gpu is False and wants_gpu:
        yield (
            "ray.use_gpu: false contradicts ray.accelerator_type or a GPU in "
            "ray.resources_per_worker; keep one"
        )


def rule_notices(config: Config) -> list[str]:
    """Keys that fit together, but do nothing in this combination."""
    notices = []
    lora_keys = _lora_keys_given(config)
    if config.adapter is None and lora_keys:
        notices.append(f"{', '.join(lora_keys)}: not used, since adapter is none: every weight is trained")
    if config.adapter and not config.lora_target_modules and not config.lora_target_linear:
        notices.append(
            "lora_target_parameters: without lora_target_modules, the LoRA is on the routed experts only "
            "(PEFT would add q_proj, k_proj, v_proj and o_proj)"
        )
    if config.adapter and config.lora_model_dir and _given(config, "peft_init_lora_weights"):
        notices.append("peft_init_lora_weights: not used, since lora_model_dir gives the factors")
    rhythm = [name for name in ("evals_per_epoch", "eval_steps") if _given(config, name)]
    if rhythm and not config.val_set_size and not config.test_datasets:
        notices.append(f"{rhythm[0]}: not used, since val_set_size and test_datasets hold out no rows")
    if config.overwrite and config.resume_from_checkpoint == "auto":
        notices.append(
            "overwrite: not used where output_dir holds a checkpoint, since resume_from_checkpoint: auto "
            "goes on from the newest"
        )
    elif config.overwrite and config.resume_from_checkpoint is not None:
        notices.append("overwrite: not used, since resume_from_checkpoint names what the run goes on from")
    notices += format_notices(config)
    if _given(config, "revision_of_model") and not is_hub_id(config.base_model):
        notices.append("revision_of_model: not used, since base_model is a folder, not a hub id")
    for key, spec in _specs(config):
        if spec.revision is not None and not is_hub_dataset(spec.path):
            notices.append(f"{key}.revision: not used, since {show(spec.path)} is no dataset of the hub")
    return [*notices, *evaluation_notices(config), *tracker_notices(config)]


def support_errors(config: Config) -> list[str]:
    """What the schema knows and this version cannot do yet."""
    return list(_unsupported(config))


def _unsupported(config: Config) -> Iterator[str]:
    later = "is not supported yet in this version"
    for key, value in _paths(config):
        if is_url(value):
            instead = "a path that every node sees" + (" or a hub id" if key == "base_model" else "")
            yield f"{key}: {show(redact(value))} {later}, since it is a URL; give {instead}"
    for key, value in _places(config):
        problem = url_problem(value) if is_url(value) else None
        if problem is None and key == "output_dir" and is_url(value) and not parse(value).key.strip("/"):
            problem = "is a whole bucket; name a folder in it"
        if problem is not None:
            yield f"{key}: {show(redact(value))} {problem}"


def _specs(config: Config) -> Iterator[tuple[str, DatasetSpec]]:
    for name, specs in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, spec in enumerate(specs):
            yield f"{name}.{index}", spec


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    yield "base_model", config.base_model
    resumes = config.resume_from_checkpoint
    own = resumes is not None and resumes.startswith(f"{config.output_dir.rstrip('/')}/checkpoints/")
    optional = {
        "lora_model_dir": config.lora_model_dir if config.adapter else None,
        "resume_from_checkpoint": resumes if not own else None,
        "ray.storage_path": config.ray.storage_path,
    }
    for key, value in optional.items():
        if value is not None:
            yield key, value


def _places(config: Config) -> Iterator[tuple[str, str]]:
    """Those that may be URLs."""
    yield "output_dir", config.output_dir
    if config.dataset_prepared_path is not None:
        yield "dataset_prepared_path", config.dataset_prepared_path
    for key, spec in _specs(config):
        yield f"{key}.path", spec.path
        for file in spec.data_files:
            yield f"{key}.data_files", file


def store_urls(config: Config) -> list[str]:
    """The URLs from which data is read, and to which shards and the run are written."""
    return [value for _, value in _places(config) if is_url(value)]


def path_errors(config: Config) -> list[str]:
    """Files and folders that are named and not there (relative ones, from where this process runs)."""
    errors = _base_model_errors(config.base_model)
    if config.adapter and config.lora_model_dir and not os.path.isdir(config.lora_model_dir):
        errors.append(
            f"lora_model_dir: {show(config.lora_model_dir)} is no folder; give the folder of an adapter, "
            "such as adapter/ of an earlier run"
        )
    for key, spec in _specs(config):
        errors += _dataset_errors(key, spec)
    return [*errors, *template_path_errors(config)]


def is_hub_id(base_model: str) -> bool:
    """Written like owner/name, and nothing that is here."""
    return bool(_HUB_ID.fullmatch(base_model)) and not os.path.exists(base_model)


def is_hub_dataset(path: str) -> bool:
    """Whether a dataset is written like owner/name, and not like a file, or something in a folder here."""
    return is_hub_id(path) and not _DATA_FILE.fullmatch(path) and not os.path.isdir(path.split("/")[0])


def _base_model_errors(path: str) -> list[str]:
    if not os.path.isdir(path):
        if os.path.exists(path):
            return [
                f"base_model: {show(path)} is a file; give the folder that holds config.json and the weights"
            ]
        if is_hub_id(path):
            return []  # whether there is such a model shows when its config.json is fetched
        return [
            f"base_model: {show(path)} does not exist; give the folder of the base model, or its hub id "
            "(owner/name)"
        ]
    return model_folder_errors(path, path)


def model_folder_errors(folder: str, name: str) -> list[str]:
    """What is wrong with the config.json of a model's folder; `name`: what the user calls the model."""
    file = os.path.join(folder, "config.json")
    try:
        with open(file, encoding="utf-8") as stream:
            shape = json.load(stream)
    except FileNotFoundError:
        return [f"base_model: {show(name)} holds no config.json; give a Nemotron-H model"]
    except (OSError, ValueError) as error:
        return [f"base_model: {show(file)} cannot be read as JSON ({show(str(error))}); download it again"]
    kind = shape["model_type"] if isinstance(shape, dict) and "model_type" in shape else None
    if kind != "nemotron_h":
        return [
            f"base_model: {show(name)} has model_type {show(kind)}; only nemotron_h models are trained here, "
            "give one"
        ]
    return []


def _dataset_errors(key: str, spec: DatasetSpec) -> list[str]:
    if is_url(spec.path):
        return []  # whether it is there shows when its files are listed
    if is_hub_dataset(spec.path):
        return []  # whether there is such a dataset, with such files, shows when its files are listed
    if not os.path.exists(spec.path):
        if any(letter in spec.path for letter in "*?[") and glob.glob(spec.path, recursive=True):
            return []
        return [
            f"{key}.path: {show(spec.path)} does not exist; give a file, a folder of files, a pattern such "
            "as data/*.jsonl, or a dataset of the hub (owner/name)"
        ]
    if not spec.data_files:
        return []
    if not os.path.isdir(spec.path):
        return [
            f"{key}.data_files: needs a folder in path, and {show(spec.path)} is a file; remove data_files"
        ]
    return [
        f"{key}.data_files: {show(name)} is not in {show(spec.path)}; name files of that folder"
        for name in spec.data_files
        if not is_url(name) and not glob.glob(os.path.join(spec.path, name), recursive=True)
    ]
