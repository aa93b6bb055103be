"""Bad input: each is an error of one line that names key, value, rule and remedy."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ray.config.checks import store_urls
from nemo_ray.config.kinds import kinds_of
from nemo_ray.config.schema import Config, DatasetSpec, RaySection, Section
from tests.config.helpers import Keys, errors_of, load, lora

WRONG: dict[str, list[Any]] = {
    "a whole number above 0": [0, -1, 1.5, True, "many", [1], {"a": 1}],
    "a whole number, 0 or more": [-1, 0.5, True, "x"],
    "a whole number, 0 or more, or -1 for no limit": [-2, 0.5, "x"],
    "a whole number from 0 to 4294967295": [-1, 2**32, 1.5, True],
    "a finite number above 0": [0, -1.0, True, "x", float("inf"), float("nan"), [1.0]],
    "a finite number, 0 or more": [-0.1, True, "x", float("inf"), float("nan")],
    "a number above 0, up to 1000000": [0, -1.0, True, "x", 1e308, 1000001, float("inf"), float("nan")],
    "a whole number from 2 to 2147483647": [-1, 0, 1, 2**31, 10**10, 2.5, True, "x"],
    "a whole number above 0, or [the fewest, the most]": [
        0,
        -1,
        1.5,
        True,
        "x",
        [2],
        [1, 2, 3],
        [3, 2],
        [0, 1],
    ],
    "a number from 0 to below 1": [-0.1, 1, 2.0, True, "x", float("nan")],
    "a number from 0 to 1": [-0.1, 1.1, True, "x", float("nan")],
    "a fraction below 1, or a whole number of rows": [-1, 1.5, True, "x", float("nan"), float("inf")],
    "true or false": [1, 0, "sometimes", [True]],
    "true, false or auto": [1, "sometimes"],
    "text": [1, True, ["a"], ""],
    "text, or empty text": [1, True, ["a"]],
    "a map from a role to a list of its names": ["x", ["a"], {"a": 1}, {"a": [1]}],
    "a map from text to values": ["x", 3, ["a"]],
    "a path": [1, True, {"a": 1}, ""],
    "auto or a path": [1, {"a": 1}, ""],
    "tokenizer_default or a path": [1, True, ""],
    "a list of text": [1, [1], [""], {"a": 1}, ""],
    "a list of paths": [1, [1], ""],
    "a list of datasets, each with a path": ["x", 3, [3], ["x"]],
    "a map from text to text": ["x", ["a"], {"a": 1}, {"a": ["b"]}],
    "a map from resource name to a finite number, 0 or more": [
        "x",
        {"GPU": float("inf")},
        {"GPU": -1},
        {"GPU": "one"},
        {"GPU": True},
    ],
    "a section of keys": ["x", 3, ["a"]],
    "a map from text to a whole number above 0": ["x", ["a"], {"a": 0}, {"a": 1.5}, {"a": "b"}, {"a": True}],
    "a map from text to a finite number above 0": [
        "x",
        {"a": float("inf")},
        ["a"],
        {"a": 0},
        {"a": "b"},
        {"a": True},
    ],
    "true, gaussian or orthogonal": [3, "something else", "eva", False, ["a"]],
    "lora, qlora or none": ["dora", 3, True],
    "the name of an AdamW": [3, ["adamw_torch"]],
}
# What other kinds of keys refuse: each is one of the words that the message lists.
OTHER = [3, True, "something else", ["a"]]


def cases() -> list[tuple[str, Any]]:
    sections: list[tuple[str, type[Section]]] = [
        ("", Config),
        ("ray.", RaySection),
        ("datasets.0.", DatasetSpec),
    ]
    return [
        (prefix + key, value)
        for prefix, section in sections
        for key, kind in kinds_of(section).items()
        for value in WRONG.get(kind, OTHER)
    ]


@pytest.mark.parametrize(("key", "value"), cases(), ids=lambda item: str(item)[:40])
def test_wrong_values_of_every_key(world: Keys, key: str, value: Any) -> None:
    first, *rest = key.split(".")
    if first == "ray" and rest:
        world["ray"] = {rest[0]: value}
    elif rest:
        world["datasets"][0][rest[-1]] = value
    else:
        world[first] = value
    lines = errors_of(world)
    assert lines and all(line.startswith(key) for line in lines), lines
    section = DatasetSpec if rest[:1] == ["0"] else RaySection if rest else Config
    kind = kinds_of(section)[key.split(".")[-1]]
    assert (
        any(kind in line for line in lines) or "give a dataset" in lines[0] or kind.startswith("the name")
    ), lines


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lora_rank", "lora_r"),
        ("base_modl", "base_model"),
        ("learning-rate", "learning_rate"),
        ("Seed", "seed"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("wandb_projct", "wandb_project"),
        ("max_failures", "ray.max_failures"),
        ("field_messages", None),
        ("zzzzzz", None),
    ],
)
def test_unknown_keys_name_the_nearest(world: Keys, key: str, near: str | None) -> None:
    (line,) = errors_of(world | {key: 1})
    assert line.startswith(f"{key}: ")
    assert (f"did you mean {near}?" in line) if near else "did you mean" not in line


@pytest.mark.parametrize(
    ("key", "near"),
    [("fild_messages", "field_messages"), ("message_filed_role", "message_field_role"), ("seed", "seed")],
)
def test_unknown_dataset_keys(world: Keys, key: str, near: str) -> None:
    world["datasets"][0][key] = 1
    (line,) = errors_of(world)
    assert line.startswith(f"datasets.0.{key}: ") and f"{near}?" in line


def test_missing_keys(world: Keys) -> None:
    lines = errors_of({})
    assert [line.split(":")[0] for line in lines] == ["base_model", "datasets"]
    assert all("missing; give " in line for line in lines)


def test_missing_or_empty_datasets(world: Keys) -> None:
    (line,) = errors_of(world | {"datasets": []})
    assert line == "datasets: [] is not valid; give a list of datasets, each with a path"
    (line,) = errors_of(world | {"datasets": [{"type": "completion"}]})
    assert line == "datasets.0.path: missing; give a path"


RULES: list[tuple[Keys, list[str]]] = [
    ({"lora_target_modules": None}, ["lora_target_modules", "lora_target_linear", "lora_target_parameters"]),
    (
        {"lora_dropout": 0.1, "lora_target_parameters": ["up_proj"]},
        ["lora_dropout: 0.1", "lora_dropout: 0"],
    ),
    ({"lora_modules_to_save": ["gate"]}, ["lora_modules_to_save: gate", "lm_head or embeddings"]),
    ({"evals_per_epoch": 1, "eval_steps": 2}, ["evals_per_epoch: 1", "eval_steps: 2", "keep one"]),
    ({"saves_per_epoch": 1, "save_steps": 2}, ["saves_per_epoch: 1", "save_steps: 2", "keep one"]),
    ({"warmup_steps": 1, "warmup_ratio": 0.1}, ["warmup_steps: 1", "warmup_ratio: 0.1", "keep one"]),
    ({"lr_scheduler": "constant", "warmup_steps": 1}, ["constant_with_warmup"]),
    (
        {"val_set_size": 0.1, "test_datasets": [{"path": "x"}]},
        ["val_set_size: 0.1", "test_datasets", "keep one"],
    ),
    ({"dp_shard_size": 2, "dp_replicate_size": 3, "ray": {"num_workers": 4}}, ["= 6", "ray.num_workers: 4"]),
    ({"dp_shard_size": 2, "ray": {"num_workers": [2, 4]}}, ["dp_shard_size", "ray.num_workers is [2, 4]"]),
    (
        {"optimizer": "adamw_8bit", "ray": {"num_workers": [1, 2]}},
        ["adamw_8bit", "ray.num_workers is [1, 2]"],
    ),
    ({"ray": {"num_workers": [4, 2]}}, ["ray.num_workers", "[the fewest, the most]"]),
    ({"ray": {"num_workers": [0, 2]}}, ["ray.num_workers", "[the fewest, the most]"]),
    ({"dp_shard_size": 3, "ray": {"num_workers": 4}}, ["dp_shard_size: 3", "divide", "ray.num_workers: 4"]),
    ({"ray": {"use_gpu": False, "resources_per_worker": {"GPU": 1}}}, ["ray.use_gpu: false"]),
    ({"ray": {"use_gpu": False, "accelerator_type": "H100"}}, ["ray.use_gpu: false"]),
    (
        {"micro_batch_size": 2, "sequence_len": 2**30},
        ["micro_batch_size: 2", "sequence_len: 1073741824", "more than 2147483647 tokens"],
    ),
    ({"chat_template": "llama3"}, ["chat_template: llama3", "tokenizer_default", ".jinja"]),
    ({"special_tokens": {"sep_token": "<s>"}}, ["special_tokens.sep_token", "pad_token"]),
    ({"adapter": "qlora"}, ["adapter: qlora needs `load_in_4bit: true`"]),
    ({"load_in_4bit": True}, ["load_in_4bit: true needs `adapter: qlora`"]),
    ({"quantize_moe_experts": True}, ["quantize_moe_experts: true needs `load_in_4bit: true`"]),
]


@pytest.mark.parametrize(("keys", "parts"), RULES, ids=lambda item: " ".join(item)[:60])
def test_rules_between_keys(world: Keys, keys: Keys, parts: list[str]) -> None:
    (line,) = errors_of(lora(world) | keys, check_support=False, check_paths=False)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("split", ["train+test", "[:10]", "train[:10", "train[10]", "train[a:b]", "tr/ain"])
def test_bad_splits(world: Keys, split: str) -> None:
    world["datasets"][0]["split"] = split
    (line,) = errors_of(world)
    assert line.startswith(f"datasets.0.split: {split} is not a slice")


@pytest.mark.parametrize("split", ["train", "train[:20%]", "train[100:200]", "train[-10%:]", "train[: 5]"])
def test_good_splits(world: Keys, split: str) -> None:
    world["datasets"][0]["split"] = split
    assert load(world).config.datasets[0].split == split


def test_lora_keys_without_adapter(world: Keys) -> None:
    (line,) = errors_of(world | {"lora_r": 8, "lora_target_linear": True})
    assert line.startswith("adapter: missing, but lora_r, lora_target_linear is given; add `adapter: lora`")


def test_a_colon_without_a_space_is_no_silent_key(world: Keys) -> None:
    keys = world | {"adapter": "lora", "lora_target_linear": True, "rank_pattern": {"q_proj:4": None}}
    (line,) = errors_of(keys)
    assert line == "rank_pattern.q_proj:4: has no value, since YAML wants a space there; write `q_proj: 4`"


def test_four_bits_without_adapter(world: Keys) -> None:
    (line,) = errors_of(world | {"load_in_4bit": True}, check_support=False)
    assert "needs `adapter: qlora`" in line


LINEAR: Keys = {"adapter": "lora", "lora_target_linear": True}
UNSUPPORTED: list[tuple[Keys, str]] = [
    (
        {"adapter": "lora", "lora_target_linear": True, "lora_model_dir": "s3://b/p"},
        "lora_model_dir: s3://b/p",
    ),
    (
        {"output_dir": "s3://b/run", "resume_from_checkpoint": "s3://b/other/checkpoints/step-4"},
        "resume_from_checkpoint: s3://b/other/checkpoints/step-4",
    ),
    ({"ray": {"storage_path": "s3://b/p"}}, "ray.storage_path: s3://b/p"),
]


@pytest.mark.parametrize(("keys", "start"), UNSUPPORTED, ids=lambda item: str(item)[:40])
def test_not_supported_yet_is_refused_by_name(world: Keys, keys: Keys, start: str) -> None:
    (line,) = errors_of(world | keys)
    assert line.startswith(start) and "not supported yet" in line
    assert load(world | keys, check_support=False, check_paths=False)


URLS: list[tuple[Keys, str]] = [
    ({"dataset_prepared_path": "gs://k:hidden@b"}, "dataset_prepared_path: gs://***@b holds credentials"),
    ({"output_dir": "s3://k:hidden@b/p"}, "output_dir: s3://***@b/p holds credentials"),
    ({"output_dir": "s3://bucket/"}, "output_dir: s3://bucket/ is a whole bucket; name a folder in it"),
    ({"ray": {"storage_path": "s3://k:hidden@b/p"}}, "ray.storage_path: s3://***@b/p is not supported yet"),
    ({"datasets": [{"path": "s3://b/x?secret_key=hidden"}]}, "datasets.0.path: s3://b/x?*** holds options"),
    ({"datasets": [{"path": "hf://datasets/a/b"}]}, "datasets.0.path: hf://datasets/a/b is not an object"),
    ({"datasets": [{"path": "http://b/x.jsonl"}]}, "datasets.0.path: http://b/x.jsonl is not an object"),
]


@pytest.mark.parametrize(("keys", "start"), URLS, ids=lambda item: str(item)[:40])
def test_urls_that_cannot_be_used_are_told_without_their_secrets(world: Keys, keys: Keys, start: str) -> None:
    (line,) = errors_of(world | keys)
    assert line.startswith(start) and "hidden" not in line


def test_data_and_the_run_may_lie_in_object_stores(world: Keys) -> None:
    keys = {
        "datasets": [
            {"path": "s3://b/rows-*.jsonl"},
            {"path": "gs://anonymous@b", "data_files": ["x.jsonl"]},
        ],
        "dataset_prepared_path": "abfs://c@account.dfs.core.windows.net/prepared",
        "output_dir": "s3://b/runs/1",
        "resume_from_checkpoint": "s3://b/runs/1/checkpoints/step-4",
    }
    config = load(world | keys).config
    assert store_urls(config) == [
        *(keys["output_dir"], keys["dataset_prepared_path"], "s3://b/rows-*.jsonl", "gs://anonymous@b")
    ]


def test_paths(world: Keys) -> None:
    Path("file.txt").write_text("x")
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("empty").mkdir()
    models = {
        "/no/such/folder": "does not exist",
        "./nothing": "does not exist",
        "file.txt": "is a file",
        "empty": "no config.json",
        "llama": "only nemotron_h",
        "broken": "cannot be read as JSON",
    }
    for path, part in models.items():
        (line,) = errors_of(world | {"base_model": path})
        assert line.startswith("base_model: ") and path in line and part in line
        assert errors_of(world | {"base_model": path}, check_paths=False) == []
    assert errors_of(world | {"base_model": "nvidia/Nemotron-3-Nano"}) == []


def test_a_folder_named_like_a_hub_model_is_used(world: Keys) -> None:
    Path("nvidia").mkdir()
    Path("base").rename("nvidia/nano")
    assert load(world | {"base_model": "nvidia/nano"}).config.base_model == "nvidia/nano"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ({"path": "gone.jsonl"}, "datasets.0.path: gone.jsonl does not exist"),
        ({"path": "data/gone.jsonl"}, "datasets.0.path: data/gone.jsonl does not exist"),
        ({"path": "base/gone"}, "datasets.0.path: base/gone does not exist"),
        ({"path": "gone-*.jsonl"}, "datasets.0.path: gone-*.jsonl does not exist"),
        (
            {"path": ".", "data_files": ["rows.jsonl", "gone.jsonl"]},
            "datasets.0.data_files: gone.jsonl is not in .",
        ),
        ({"path": "rows.jsonl", "data_files": "rows.jsonl"}, "datasets.0.data_files: needs a folder in path"),
    ],
)
def test_dataset_paths(world: Keys, spec: Keys, part: str) -> None:
    (line,) = errors_of(world | {"datasets": [spec]})
    assert part in line
    for fine in ({"path": ".", "data_files": ["*.jsonl"]}, {"path": "*.jsonl"}, {"path": "owner/chats"}):
        assert errors_of(world | {"datasets": [fine]}) == []


def test_a_part_of_shards_is_one_of_them(world: Keys) -> None:
    for keys, part in (
        ({"shards": 2, "shards_idx": 2}, "datasets.0.shards_idx: 2 is no part of shards: 2"),
        ({"shards_idx": 1}, "datasets.0.shards_idx: 1 needs shards"),
    ):
        (line,) = errors_of(world | {"datasets": [{"path": "rows.jsonl", **keys}]})
        assert part in line


def test_other_paths(world: Keys) -> None:
    lines = errors_of(
        world,
        "chat_template=gone.jinja",
        "test_datasets=[{path: gone.parquet}]",
    )
    assert [line.split(":")[0] for line in lines] == ["test_datasets.0.path", "chat_template"]


def test_messages_are_short_single_lines(world: Keys) -> None:
    (line,) = errors_of(world | {"lora_r": "x\n" * 5000})
    assert len(line) < 200


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("pissa", "takes the first product of the factors off the base's weights"),
        ("pissa_niter_16", "off the base's weights"),
        ("olora", "off the base's weights"),
        ("loftq", "off the base's weights"),
        ("corda", "a pass over data"),
        ("eva", "a pass over data"),
        ("mica", "freezes B"),
        (False, "debugging"),
    ],
)
def test_starts_of_a_lora_that_are_not_here_are_refused_with_the_reason(
    world: Keys, value: Any, reason: str
) -> None:
    (line,) = errors_of(lora(world) | {"peft_init_lora_weights": value})
    assert line.startswith(f"peft_init_lora_weights: {str(value).lower()} is refused: it ")
    assert reason in line and line.endswith("use true, gaussian or orthogonal")


def test_an_adapter_to_go_on_from_must_be_a_folder(world: Keys) -> None:
    (line,) = errors_of(lora(world) | {"lora_model_dir": "nowhere"})
    assert line.startswith("lora_model_dir: nowhere is no folder; give")


def test_lora_keys_without_an_adapter_are_named_whatever_they_begin_with(world: Keys) -> None:
    (line,) = errors_of(world | {"rank_pattern": {"q_proj": 4}, "peft_use_rslora": True})
    assert line.startswith("adapter: missing, but rank_pattern, peft_use_rslora is given")


def test_experts_only_is_said(world: Keys) -> None:
    experts = {"adapter": "lora", "lora_target_parameters": ["up_proj"]}
    (line,) = load(world | experts).notices
    assert line.startswith("lora_target_parameters: ") and "the routed experts only" in line
    assert load(world | experts | {"lora_target_linear": True}).notices == ()


@pytest.mark.parametrize(
    ("resume", "said"),
    [
        ("auto", "where output_dir holds a checkpoint"),
        ("outputs/out/checkpoints/step-4", "what the run goes on from"),
    ],
)
def test_what_becomes_of_overwrite_in_a_run_that_is_resumed(world: Keys, resume: str, said: str) -> None:
    (line,) = load(world | {"overwrite": True, "resume_from_checkpoint": resume}).notices
    assert line.startswith("overwrite: not used") and said in line
    for alone in ({"overwrite": True}, {"resume_from_checkpoint": resume}):
        assert load(world | alone).notices == ()


def test_the_largest_and_the_smallest_pack(world: Keys) -> None:
    for length in (2, 2**31 - 1):
        assert load(world | {"sequence_len": length}).config.sequence_len == length


def test_weights_are_for_all_datasets_or_for_none(world: Keys) -> None:
    entry = world["datasets"][0]
    (line,) = errors_of(world | {"datasets": [entry | {"weight": 2}, entry]})
    assert (
        line == "datasets.1.weight: missing, but other datasets have one; give it to all of them or to none"
    )
    (line,) = errors_of(world | {"test_datasets": [entry | {"weight": 2}]})
    assert line.startswith("test_datasets.weight: 2.0 means nothing in evaluation")
