"""Reading: the file, overrides, absent keys, the order of errors, and that it is quick."""

import io
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_ray.config.axolotl import RENAMED
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import (
    AdapterSection,
    Config,
    DataSection,
    ModelSection,
    RaySection,
    Section,
    TrackingSection,
    TrainSection,
)
from nemo_ray.config.translate import FOLDED_KEYS
from nemo_ray.errors import ConfigError
from tests.config.helpers import Keys, errors_of, load, lora

REPOSITORY = Path(__file__).parents[2]


def test_defaults(world: Keys) -> None:
    loaded = load(world)
    config = loaded.config
    assert loaded.notices == ()
    assert (config.adapter, config.sequence_len, config.bf16, config.seed) == (None, 2048, "auto", 42)
    assert (config.lora_alpha, config.ray.max_failures, config.datasets[0].field_messages) == (
        32,
        3,
        "messages",
    )


def test_lora_alpha_follows_the_rank_unless_given(world: Keys) -> None:
    assert load(lora(world), "lora_r=5").config.lora_alpha == 10
    assert load(lora(world), "lora_r=5", "lora_alpha=7").config.lora_alpha == 7


def test_round_trip_pickle_and_sections(world: Keys) -> None:
    config = load(lora(world), "ray.resources_per_worker={CPU: 0.5}", "val_set_size=0.1").config
    assert Config.model_validate(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    sections: dict[str, type[Section]] = {
        "model": ModelSection,
        "adapter_config": AdapterSection,
        "data": DataSection,
        "train": TrainSection,
        "tracking": TrackingSection,
    }
    seen: set[str] = set()
    for name, kind in sections.items():
        section = getattr(config, name)
        assert type(section) is kind and section == config.section(kind)
        assert pickle.loads(pickle.dumps(section)) == section
        for key in kind.model_fields:
            assert getattr(section, key) == getattr(config, key)
        assert not seen & set(kind.model_fields)
        seen |= set(kind.model_fields)
    assert seen | {"ray"} == set(Config.model_fields)
    assert isinstance(config.ray, RaySection)


def test_frozen(world: Keys) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(world).config.seed = 3  # type: ignore[misc]


def test_home_is_expanded_and_relative_paths_stay(world: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(world["base_model"]).parent))
    config = load(world, "base_model=~/base", "datasets.0.path=rows.jsonl", "output_dir=out/x").config
    assert (config.base_model, config.datasets[0].path) == (world["base_model"], "rows.jsonl")
    assert config.output_dir == "out/x"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora_r=32", "lora_r", 32),
        ("learning_rate=3e-5", "learning_rate", 3e-5),
        ("learning_rate=1E-5", "learning_rate", 1e-5),
        ("learning_rate=1", "learning_rate", 1.0),
        ("val_set_size=12", "val_set_size", 12),
        ("val_set_size=12.0", "val_set_size", 12),
        ("val_set_size=0.25", "val_set_size", 0.25),
        ("bf16=false", "bf16", False),
        ("max_grad_norm=0", "max_grad_norm", None),
        ("lora_target_modules=[q_proj, in_proj]", "lora_target_modules", ("q_proj", "in_proj")),
        ("lora_target_modules=o_proj", "lora_target_modules", ("o_proj",)),
        ("special_tokens={pad_token: <pad>}", "special_tokens", {"pad_token": "<pad>"}),
        ("special_tokens.pad_token=x=y", "special_tokens", {"pad_token": "x=y"}),
        ("completion_prompts=[a, 'b, c']", "completion_prompts", ("a", "b, c")),
    ],
)
def test_override_values(world: Keys, override: str, key: str, value: object) -> None:
    got = getattr(load(lora(world), override).config, key)
    assert got == value and type(got) is type(value)


def test_overrides_reach_sections_and_lists(world: Keys) -> None:
    config = load(
        world,
        "ray.num_workers=4",
        "ray_num_workers=6",  # axolotl's spelling of the same key: the last one wins
        "datasets.0.message_field_role=from",
        f"datasets.1.path={world['datasets'][0]['path']}",
        "datasets.1.type=completion",
    ).config
    assert config.ray.num_workers == 6
    assert config.datasets[0].message_property_mappings == {"role": "from", "content": "content"}
    assert [spec.type for spec in config.datasets] == ["chat_template", "completion"]


def test_override_of_whole_sections(world: Keys) -> None:
    path = world["datasets"][0]["path"]
    config = load(
        world, f"datasets={{path: {path}, message_field_role: from}}", "ray={num_workers: 2}"
    ).config
    assert config.datasets[0].message_property_mappings["role"] == "from"
    assert config.ray.num_workers == 2


def test_override_without_value_makes_absent(world: Keys) -> None:
    world["evals_per_epoch"], world["val_set_size"] = 3, 0.1
    config = load(world, "evals_per_epoch=", "eval_steps=5").config
    assert (config.evals_per_epoch, config.eval_steps) == (None, 5)


def test_override_of_a_list_that_the_file_lacks(world: Keys) -> None:
    path = world.pop("datasets")[0]["path"]
    assert load(world, f"datasets.0.path={path}").config.datasets[0].path == path


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora_r", "write key=value"),
        ("=3", "write key=value"),
        ("ray.=3", "write key=value"),
        ("--lora-r=3", "write lora_r=3"),
        ("seed.x=3", "seed holds a single value"),
        ("datasets.7.path=x", "list with 1 entries"),
        ("datasets.first.path=x", "list with 1 entries"),
        ("lora_r=[1", "lora_r=[1, line 1"),
        ("lora_rr=3", "did you mean lora_r?"),
        ("ray.num_worker=3", "did you mean ray.num_workers?"),
        ("ray.seed=3", "did you mean seed?"),
        ("datasets.0.feild=x", "did you mean datasets.0.field?"),
        ("num_workers=3", "did you mean ray.num_workers?"),
        ("foo.bar=3", "foo: "),
    ],
)
def test_bad_overrides(world: Keys, override: str, part: str) -> None:
    world["seed"] = 1
    (line,) = errors_of(world, override)
    assert part in line


@given(text=st.text(max_size=40))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_loads_or_is_a_config_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(str(file))


@given(
    key=st.sampled_from(sorted({*Config.model_fields, *FOLDED_KEYS, *RENAMED})),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
@example(key="pretraining_dataset", value="")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_loads_or_names_its_key(world: Keys, key: str, value: object) -> None:
    base = lora(world) | {"val_set_size": 0.1}
    for line in errors_of(base | {key: value}):
        assert (
            key in line
            or RENAMED.get(key, key) in line
            or (key == "pretraining_dataset" and line.startswith("datasets.1."))  # which it becomes
            or "must" in line
            or "missing" in line
            or "quote it" in line
        ), line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ["line 3"]),
        ("a: 1\n\tb: 2\n", ["line 2"]),
        ("seed: 1\nlora_r: 2\nseed: 3\n", ["line 3", "'seed' is given twice", "line 1"]),
        ("ray: {num_workers: 1, num_workers: 1}\n", ["line 1", "'num_workers' is given twice"]),
        ("seed: !!python/object/apply:os.system ['true']\n", ["line 1", "only plain text"]),
        ("seed: !secret x\n", ["line 1", "only plain text"]),
        ("- a\n- b\n", ["list, not a map"]),
        ("just text\n", ["str, not a map"]),
        ("on: 3\n", ["quote it"]),
        ("1: 3\n", ["quote it"]),
        ("? [a]\n: 3\n", ["line 1: a key is a list or a map, not text"]),
        ("datasets: &a [*a]\n", ["refers to itself"]),
        ("seed: \x01\n", ["not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["line 2: expected a single document", ", but found another document"]),
    ],
)
def test_yaml_errors_name_the_place(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    (line,) = str(caught.value).splitlines()
    for part in parts:
        assert part in line


def test_merge_keys_are_not_duplicates(world: Keys, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    path = world["datasets"][0]["path"]
    file.write_text(
        f"base_model: {world['base_model']}\n"
        f"datasets:\n  - &one {{path: {path}, field_messages: a}}\n  - {{<<: *one, field_messages: b}}\n"
    )
    assert [spec.field_messages for spec in load_config(str(file)).config.datasets] == ["a", "b"]


@pytest.mark.parametrize(("name", "part"), [("none.yaml", "no such config file"), ("", "is a folder")])
def test_config_file_missing(tmp_path: Path, name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(str(tmp_path / name))


def test_no_name_is_no_folder() -> None:
    with pytest.raises(ConfigError, match="CONFIG.yaml: '' names no file"):
        load_config("")


def test_a_dash_is_standard_input(world: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    given(yaml.safe_dump(world | {"wandb_name": "ä"}, allow_unicode=True).encode())
    config = load_config("-", ["seed=5"]).config
    assert (config.wandb_name, config.seed) == ("ä", 5)
    for content, said in ((b"a: [", "standard input, line 1"), (b"\xff", "standard input: is not text")):
        given(content)
        with pytest.raises(ConfigError, match=said):
            load_config("-")
    monkeypatch.setattr("sys.stdin", None)  # as after `<&-`
    with pytest.raises(ConfigError, match="standard input, which is closed"):
        load_config("-")


def test_config_file_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00base")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(str(tmp_path / "x.yaml"))


def test_every_key_and_type_error_comes_at_once_and_before_rules_and_paths(world: Keys) -> None:
    world |= {"evals_per_epoch": 1, "eval_steps": 1, "base_model": "/does/not/exist"}
    wrong = {"lora_r": "x", "micro_batch_size": 0, "sed": 1, "ray": {"num_workers": 1.5}, "optimizer": "lion"}
    (Path.cwd() / "all.yaml").write_text(str(world | wrong | {"datasets": [{"path": "/nope", "tipe": 1}, 3]}))
    with pytest.raises(ConfigError) as caught:
        load_config("all.yaml")
    lines = str(caught.value).splitlines()
    keys = {line.split(":")[0] for line in lines}
    expected = {
        "lora_r",
        "micro_batch_size",
        "sed",
        "ray.num_workers",
        "optimizer",
        "datasets.0.tipe",
        "datasets.1",
    }
    assert keys == expected and len(lines) == len(expected)

    world["datasets"] = [{"path": "/nope"}]
    (Path.cwd() / "all.yaml").write_text(str(world))
    with pytest.raises(ConfigError) as caught:
        load_config("all.yaml")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["evals_per_epoch"]

    del world["eval_steps"]
    (Path.cwd() / "all.yaml").write_text(str(world))
    with pytest.raises(ConfigError) as caught:
        load_config("all.yaml")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "base_model",
        "datasets.0.path",
    ]
    assert load_config("all.yaml", check_paths=False).config.base_model == "/does/not/exist"


def test_answers_fast_without_torch_or_ray(world: Keys) -> None:
    load(world)
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "from nemo_ray.config.load import load_config\n"
        "from nemo_ray.errors import ConfigError\n"
        "load_config('config.yaml')\n"
        "try: load_config('config.yaml', ['lora_rr=3'])\n"
        "except ConfigError as error: print(error.exit_code)\n"
        "print(time.perf_counter() - start)\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path.cwd(),
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    exit_code, seconds = done.stdout.split()
    assert exit_code == "2" and float(seconds) < 3, (seconds, time.perf_counter() - start)
