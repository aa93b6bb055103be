"""axolotl's files and keys: each runs, gets exactly one line, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ray.config.axolotl import (
    ADAMW_NAMES,
    FOREIGN_IN_DATASETS,
    KNOWN_PLUGINS,
    RENAMED,
    RENAMED_IN_DATASETS,
    lookup,
)
from nemo_ray.config.axolotl_keys import FOREIGN
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config, DatasetSpec
from nemo_ray.config.translate import FOLDED_KEYS
from tests.config.helpers import Keys, errors_of, load, lora
from tests.config.promised import PROMISED, REFUSED

FILES = Path(__file__).parent / "axolotl"


@pytest.mark.parametrize(("key", "value", "outcome"), PROMISED, ids=lambda item: str(item)[:30])
def test_promised_keys(world: Keys, key: str, value: Any, outcome: int) -> None:
    base = lora(world) | {"val_set_size": 0.1}
    errors = errors_of(base | {key: value})
    if outcome == REFUSED:
        assert errors and all(": " in line for line in errors)
        assert key in errors[0].split(":")[0] or key in errors[0], errors
        return
    assert errors == []
    notices = load(base | {key: value}).notices
    assert len(notices) == outcome and all(line.startswith(f"{key}: ") for line in notices), notices


@pytest.mark.parametrize(
    "key", sorted({key for key, _, _ in PROMISED} | {"datasets", "test_datasets", "ray"})
)
def test_a_key_without_a_value_counts_as_absent(world: Keys, key: str) -> None:
    base = lora(world)
    base.pop(key, None)
    if key == "adapter":
        del base["lora_target_modules"]
    if key == "lora_target_modules":
        base["lora_target_linear"] = True
    if key == "datasets":
        assert errors_of(base | {key: None}) == errors_of(base) != []
    else:
        assert load(base | {key: None}) == load(base)


def test_every_foreign_key_gets_one_line_or_is_refused(world: Keys) -> None:
    for key, entry in lookup(FOREIGN).items():
        value = {"asks": "for something"}
        if entry.refused:
            (line,) = errors_of(world | {key: value})
            assert line.startswith(f"{key}: ") and entry.line in line
            assert load(world | {key: value}, check_support=False).notices == ()
        else:
            assert load(world | {key: value}).notices == (f"{key}: {entry.line}",)
        for quiet in (*entry.as_is, [], {}):
            assert load(world | {key: quiet}).notices == (), key


def test_every_foreign_dataset_key_gets_one_line_or_is_refused(world: Keys) -> None:
    (spec,) = world["datasets"]
    for key, entry in lookup(FOREIGN_IN_DATASETS).items():
        changed = world | {"datasets": [spec | {key: "something"}]}
        if entry.refused:
            (line,) = errors_of(changed)
            assert line.startswith(f"datasets.0.{key}: something is refused: {entry.line}")
        else:
            assert load(changed).notices == (f"datasets.0.{key}: {entry.line}",)


def test_no_key_has_two_answers() -> None:
    top = [key for entry in FOREIGN for key in entry.keys] + [*RENAMED, *FOLDED_KEYS, *Config.model_fields]
    assert sorted(top) == sorted(set(top))
    nested = [key for entry in FOREIGN_IN_DATASETS for key in entry.keys]
    nested += [*RENAMED_IN_DATASETS, *DatasetSpec.model_fields]
    assert sorted(nested) == sorted(set(nested))
    known = {*top}
    assert {new.split(".")[0] for new in RENAMED.values()} <= known


def test_keys_with_one_answer_share_one_line(world: Keys) -> None:
    notices = load(
        world | {"use_comet": True, "comet_mode": "b", "liger_rope": True, "use_swanlab": True}
    ).notices
    assert len(notices) == 2 and notices[0].startswith("use_comet, comet_mode, use_swanlab: ")


def test_not_applying_is_said_with_the_reason(world: Keys) -> None:
    (line,) = errors_of(world | {"lora_mlp_kernel": True})
    assert "relu2" in line and "3-D" in line
    (line,) = load(world | {"lora_qkv_kernel": True, "lora_o_kernel": True}).notices
    assert "mixer" in line
    (line,) = load(world | {"attn_implementation": "flash_attention_2"}).notices
    assert "packed attention" in line


@pytest.mark.parametrize(("runs", "name"), [(runs, n) for runs, names in ADAMW_NAMES.items() for n in names])
def test_optimizer_names_run_as_adamw(world: Keys, runs: str, name: str) -> None:
    loaded = load(world | {"optimizer": name})
    assert loaded.config.optimizer == runs
    exactly = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit")
    assert len(loaded.notices) == (name not in exactly)


def test_unknown_optimizer_lists_the_known_ones(world: Keys) -> None:
    (line,) = errors_of(world | {"optimizer": "muon"})
    assert all(name in line for name in ADAMW_NAMES)


def test_plugins(world: Keys) -> None:
    loaded = load(world | {"plugins": list(KNOWN_PLUGINS)})
    assert len(loaded.notices) == len(KNOWN_PLUGINS)
    (line,) = errors_of(world | {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]})
    assert line.startswith("plugins: axolotl.integrations.spectrum.SpectrumPlugin is not known")
    (line,) = errors_of(world | {"plugins": [3]})
    assert line.startswith("plugins: 3 is not known")


@pytest.mark.parametrize("value", ["none", "", None, "None"])
def test_adapter_none_is_a_full_fine_tune(world: Keys, value: str | None) -> None:
    loaded = load(world | {"adapter": value, "lora_r": 8, "lora_target_modules": ["q_proj"]})
    assert loaded.config.adapter is None
    (line,) = loaded.notices
    assert line.startswith("lora_r, lora_target_modules: not used")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ray_num_workers": 3}, {"ray": {"num_workers": 3}}),
        ({"resources_per_worker": {"CPU": 2}}, {"ray": {"resources_per_worker": {"CPU": 2}}}),
        ({"ray": {"use_gpu": False}, "ray_num_workers": 3}, {"ray": {"use_gpu": False, "num_workers": 3}}),
        ({"auto_resume_from_checkpoints": True}, {"resume_from_checkpoint": "auto"}),
        ({"auto_resume_from_checkpoints": False}, {"resume_from_checkpoint": None}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "auto"}),
        ({"resume_from_checkpoint": False}, {"resume_from_checkpoint": None}),
        ({"eval_strategy": "epoch", "val_set_size": 0.1}, {"evals_per_epoch": 1}),
        ({"evaluation_strategy": "steps", "eval_steps": 3, "val_set_size": 0.1}, {"eval_steps": 3}),
        ({"save_strategy": "epoch"}, {"saves_per_epoch": 1}),
        ({"save_strategy": "epoch", "save_steps": 4}, {"saves_per_epoch": None, "save_steps": 4}),
        ({"bf16": "full", "adapter": "lora", "lora_target_linear": True}, {"bf16": True}),
        ({"bfloat16": False}, {"bf16": False}),
        ({"tf32": "auto"}, {"tf32": True}),
        ({"adam_eps": 1e-6}, {"adam_epsilon": 1e-6}),
        ({"max_grad_norm": 0.0}, {"max_grad_norm": None}),
        ({"gradient_checkpointing": "offload_disk"}, {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": "auto"}),
    ],
)
def test_folding(world: Keys, keys: Keys, expected: Keys) -> None:
    got = load(world | keys).config.to_dict()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert value.items() <= got[key].items()
        else:
            assert got[key] == value


def test_strategy_no_leaves_the_first_and_last(world: Keys) -> None:
    keys = {"eval_strategy": False, "evals_per_epoch": 3, "save_strategy": "no", "val_set_size": 0.1}
    loaded = load(world | keys)
    assert (loaded.config.evals_per_epoch, loaded.config.saves_per_epoch) == (None, None)
    assert [line.split(":")[0] for line in loaded.notices] == ["eval_strategy", "save_strategy"]


@pytest.mark.parametrize(
    "keys",
    [
        {"ray_num_workers": 2, "ray": {"num_workers": 3}},
        {"bf16": True, "bfloat16": False},
        {"sequence_len": 10, "max_packed_sequence_len": 20},
    ],
)
def test_one_key_in_two_spellings_with_two_values(world: Keys, keys: Keys) -> None:
    (line,) = errors_of(world | keys)
    assert "they mean the same, keep one" in line


def test_template_file_in_axolotl_spelling(world: Keys) -> None:
    Path("mine.jinja").write_text("{{ messages }}")
    loaded = load(world | {"chat_template": "jinja", "chat_template_jinja": "mine.jinja"})
    assert loaded.config.chat_template == "mine.jinja"


def test_other_properties_of_messages_are_mapped_too(world: Keys) -> None:
    world["datasets"][0]["message_property_mappings"] = {"role": "from", "tool_calls": "calls"}
    (spec,) = load(world).config.datasets
    assert spec.message_property_mappings == {"role": "from", "content": "content", "tool_calls": "calls"}


def test_local_files_in_the_hub_librarys_spelling(world: Keys) -> None:
    spec = {"path": "json", "data_files": "rows.jsonl"}
    (got,) = load(world | {"datasets": spec}).config.datasets
    assert (got.path, got.data_files, got.ds_type) == (".", ("rows.jsonl",), "json")


def file_as_here(name: str, world: Keys) -> Keys:
    text = (FILES / name).read_text(encoding="utf-8")
    text = text.replace("BASE_MODEL", world["base_model"]).replace("DATA_FILE", world["datasets"][0]["path"])
    keys: Keys = yaml.safe_load(text)
    return keys


def test_axolotl_nano_file(world: Keys) -> None:
    keys = file_as_here("nano-qlora.yaml", world)
    loaded = load(keys)
    config = loaded.config
    assert (config.adapter, config.load_in_4bit, config.quantize_moe_experts) == ("qlora", True, True)
    spec = loaded.config.datasets[0]
    assert spec.message_property_mappings == {"role": "from", "content": "value"}
    assert spec.split == "train[:20%]"
    noticed = [key for line in loaded.notices for key in line.split(": ")[0].split(", ")]
    assert sorted(noticed) == sorted(
        ["plugins", "plugins", "liger_layer_norm", "liger_rope", "liger_rms_norm", "liger_glu_activation"]
        + ["liger_rms_norm_gated", "optimizer", "attn_implementation", "evals_per_epoch"]
    )


def test_axolotl_ray_file(world: Keys) -> None:
    loaded = load(file_as_here("full-finetune-ray.yaml", world))
    config = loaded.config
    assert (config.ray.num_workers, config.ray.resources_per_worker) == (4, {"GPU": 1})
    assert (config.resume_from_checkpoint, config.saves_per_epoch, config.max_grad_norm) == ("auto", 1, None)
    assert config.datasets[0].message_property_mappings == {"role": "from", "content": "value"}
    assert [line.split(":")[0] for line in loaded.notices] == [
        "model_type, tokenizer_type",
        "trust_remote_code",
        "fsdp_config",
    ]
    assert (config.wandb_project, config.wandb_name, config.tracking.sends_to_wandb) == (
        "nemotron",
        "full",
        True,
    )


@pytest.mark.parametrize("name", sorted(file.name for file in FILES.iterdir()))
def test_axolotl_files_load_as_they_are(name: str) -> None:
    load_config(str(FILES / name), check_paths=False, check_support=False)
