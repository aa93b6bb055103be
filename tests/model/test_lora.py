"""LoRA as it is trained: ranks and scalings by pattern, first values, modules trained whole, going on."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from nemo_ray.config.schema import AdapterSection, Config
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.model.adapter import load_adapter, save_adapter
from nemo_ray.model.batch import PackedBatch
from nemo_ray.model.load import Precision, build, fill, read_model_config
from nemo_ray.model.lora import lora_parameters
from nemo_ray.model.saving import SavedBase
from nemo_ray.peft_config import check_adapter_dir, section_of
from nemo_ray.plan import count_lora
from nemo_ray.targets import expert_paths, find_targets, linear_paths, saved_modules, strength_of
from nemo_ray.train.loss import bind_loss, next_token_targets
from tests.group import run_in_group
from tests.model.lora_rows import INITS, compare_rows, section_to_shard
from tests.model.shapes import ALL_TARGETS, CPU, randomize_lora, tiny_config

IDS = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
SHAPE = tiny_config().to_dict()
EXPERTS = {"adapter": "lora", "lora_r": 4, "lora_target_parameters": ("up_proj", "down_proj")}
SMALL = EXPERTS | {"lora_target_modules": ("q_proj", "in_proj", "up_proj", "down_proj")}
WHOLE = SMALL | {"lora_modules_to_save": ("lm_head", "embed_tokens")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    NemotronHForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


FLOAT32 = Precision()


def our_model(base: Path, section: AdapterSection, precision: Precision = FLOAT32, seed: int = 1):
    model, targets = build(read_model_config(str(base)), section, precision, CPU)
    bind_loss(model)
    fill(model, str(base), seed=0, device=CPU, adapter_seed=seed)
    return model, targets


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().packed_logits(PackedBatch.from_lengths(IDS, [[IDS.shape[1]]]))


def plain(base: Path) -> NemotronHForCausalLM:
    return NemotronHForCausalLM.from_pretrained(base, dtype=torch.float32)


def plain_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps: int = 2) -> dict[str, torch.Tensor]:
    """Some steps of AdamW on one pack; returns what trained, as it was before."""
    before = trained(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    batch = PackedBatch.from_lengths(IDS, [[25, 15]])
    targets = next_token_targets(IDS, batch.seq_idx)
    model.train()
    for _ in range(steps):
        (-model.target_log_probs(batch, targets).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


def saved(base: Path, section: AdapterSection, folder: Path, steps: int = 1) -> Path:
    """The folder of an adapter that was trained for some steps."""
    model, targets = our_model(base, section)
    train(model, steps)
    save_adapter(model, section, targets, SavedBase(str(base)), folder, write=True)
    return folder


# -- ranks and scalings by pattern ---------------------------------------------------------------

PATTERNS = {
    "bare name": {"rank_pattern": {"up_proj": 2}},
    "expert projections apart": {
        "rank_pattern": {"experts.up_proj": 6, "experts.down_proj": 3},
        "alpha_pattern": {"experts.down_proj": 5.0, "q_proj": 1.0},
    },
    "whole path": {"rank_pattern": {r"model.layers.1.mixer.experts.up_proj": 8, "in_proj": 2}},
    "expression": {"rank_pattern": {r"layers\.[01]\..*_proj": 2}, "alpha_pattern": {r".*down_proj": 7.0}},
    # The second also matches what the first does, and PEFT sorts a file's patterns by name.
    "the first counts": {"rank_pattern": {"shared_experts.up_proj": 8, "mixer.up_proj": 3, ".*up_proj": 2}},
    "the first counts, last by name": {"rank_pattern": {"up_proj": 6, ".*layers.1.*": 2}},
    "with rsLoRA": {"rank_pattern": {"experts.up_proj": 8}, "peft_use_rslora": True},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft_also_from_the_file(base, name, tmp_path):
    section = AdapterSection(**SMALL | PATTERNS[name])
    config = LoraConfig(
        r=4,
        lora_alpha=section.lora_alpha,
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        target_modules=list(section.lora_target_modules),
        target_parameters=["experts.up_proj", "experts.down_proj"],
        use_rslora=section.peft_use_rslora,
    )
    expected = peft_strengths(get_peft_model(plain(base), config))
    assert len({rank for rank, _ in expected.values()}) > 1, "the patterns act"
    model, targets = our_model(base, section)
    ours = {path: strength_of(section, path) for path in (*targets.modules, *targets.parameters)}
    assert ours == expected
    randomize_lora(model)
    save_adapter(model, section, targets, SavedBase(str(base)), tmp_path / "adapter", write=True)
    peft = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    assert peft_strengths(peft) == expected
    logits = our_logits(model)
    assert (plain_logits(peft) - logits).abs().max() < 1e-5 * logits.std()


def peft_strengths(model) -> dict[str, tuple[int, float]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            parameter = getattr(module, "parameter_name", "weight")
            path += "" if parameter == "weight" else f".{parameter}"
            found[path] = (module.r["default"], module.scaling["default"])
    return found


def test_a_factor_has_the_rank_of_its_pattern(base):
    section = AdapterSection(**SMALL | {"rank_pattern": {"experts.up_proj": 6, "q_proj": 1}})
    shapes = {name: tuple(p.shape) for name, p in lora_parameters(our_model(base, section)[0]).items()}
    assert shapes["model.layers.1.mixer.experts.up_lora_A"] == (8, 6, 64)
    assert shapes["model.layers.1.mixer.experts.down_lora_B"] == (8, 64, 4)
    assert shapes["model.layers.2.mixer.q_proj.lora_A"] == (1, 64)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: 'q_porj' matches no target; did you mean .*q_proj"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches no target"),  # there, and no target
        ({"alpha_pattern": {"layers.9.*": 2.0}}, "alpha_pattern: 'layers.9.*' matches no target; there are"),
        ({"alpha_pattern": {"(q_proj": 2.0}}, "alpha_pattern: '.q_proj' is not a regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, message):
    with pytest.raises(ConfigError, match=message):
        find_targets(AdapterSection(**SMALL | pattern), linear_paths(SHAPE), expert_paths(SHAPE))


@pytest.mark.parametrize("latent", [None, 32])
def test_what_trains_is_counted_without_building_it(latent):
    keys = ALL_TARGETS | {"rank_pattern": {"experts.up_proj": 6, "q_proj": 1}}
    config = Config(base_model="x", datasets=[{"path": "y"}], lora_modules_to_save=["lm_head"], **keys)
    model, _ = build(tiny_config(latent=latent), config.adapter_config, Precision(), CPU)
    counted = count_lora(config, tiny_config(latent=latent).to_dict())
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- first values --------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_starts_without_effect_and_can_learn(base, init):
    section = AdapterSection(**SMALL | {"peft_init_lora_weights": init})
    model, _ = our_model(base, section)
    frozen, _ = our_model(base, AdapterSection())
    assert (our_logits(model) - our_logits(frozen)).abs().max() < 1e-5 * our_logits(frozen).std()
    before = train(model)
    assert all((now - before[name]).abs().max() > 0 for name, now in trained(model).items())
    assert (our_logits(model) - our_logits(frozen)).abs().max() > 0.1 * our_logits(frozen).std()


@pytest.mark.parametrize("init", INITS)
def test_first_values_are_distributed_as_pefts(base, init):
    """Experts too, which PEFT has no orthogonal start for: each as a layer of its own."""
    parameters = [] if init == "orthogonal" else ["experts.up_proj"]
    config = LoraConfig(
        r=16, init_lora_weights=init, target_modules=["q_proj", "in_proj"], target_parameters=parameters
    )
    peft = get_peft_model(plain(base), config)
    keys = {"lora_r": 16, "lora_target_parameters": ("up_proj",), "peft_init_lora_weights": init}
    model, _ = our_model(base, AdapterSection(**SMALL | keys))
    layers = model.model.layers
    ours = {
        "layers.2.mixer.q_proj": (layers[2].mixer.q_proj.lora_A, layers[2].mixer.q_proj.lora_B),
        "layers.0.mixer.in_proj": (layers[0].mixer.in_proj.lora_A, layers[0].mixer.in_proj.lora_B),
        "layers.1.mixer.experts": (layers[1].mixer.experts.up_lora_A, layers[1].mixer.experts.up_lora_B),
    }
    for name, pair in ours.items():
        factors = [factor.detach() for factor in pair]
        like = name if parameters or "experts" not in name else "layers.2.mixer.q_proj"
        module = peft.get_submodule(f"base_model.model.model.{like}")
        for factor, theirs in zip(factors, (module.lora_A, module.lora_B), strict=True):
            theirs = theirs["default"].weight.detach()
            assert float(factor.std()) == pytest.approx(float(theirs.std()), rel=0.12, abs=1e-9), name
            assert float(factor.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.4, abs=1e-9)
        product = factors[1] @ factors[0]
        assert product.abs().max() < 1e-6 and factors[0].abs().max() > 0.01
        if init == "orthogonal":
            assert factors[1].abs().max() > 0.01
            assert torch.linalg.matrix_rank(factors[0]).eq(8).all(), "half of the rank each"


@pytest.mark.timeout(240)
def test_first_values_and_loaded_ones_do_not_depend_on_the_sharding(tmp_path):
    for init in INITS:
        model, targets = build(tiny_config(), section_to_shard(init), Precision(), CPU)
        bind_loss(model)
        fill(model, None, seed=0, device=CPU, adapter_seed=1)
        torch.save(trained(model), tmp_path / f"fresh-{init}.pt")
        train(model)
        torch.save(trained(model), tmp_path / f"trained-{init}.pt")
        save_adapter(
            model,
            section_to_shard(init),
            targets,
            SavedBase(str(tmp_path)),
            tmp_path / f"adapter-{init}",
            write=True,
        )
    run_in_group(compare_rows, 2, tmp_path, str(tmp_path), limit_s=220)


def test_first_values_follow_the_seed(base):
    section = AdapterSection(**SMALL | {"peft_init_lora_weights": "orthogonal"})
    one, same, other = (trained(our_model(base, section, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert len({float(value.flatten()[0]) for value in one.values()}) == len(one), "each its own"


def test_an_odd_rank_cannot_start_orthogonally():
    section = AdapterSection(
        **SMALL | {"peft_init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}
    )
    with pytest.raises(ConfigError, match="orthogonal needs even ranks, and model.layers.2.* has rank 3"):
        find_targets(section, linear_paths(SHAPE), expert_paths(SHAPE))


# -- modules that are trained whole --------------------------------------------------------------


def test_modules_train_whole_in_float32_beside_a_bf16_base(base, tmp_path):
    section = AdapterSection(**WHOLE)
    model, targets = our_model(base, section, Precision(torch.bfloat16, torch.bfloat16))
    assert targets.saved == {"embeddings": "model.embeddings", "lm_head": "lm_head"}
    before = train(model)
    for name in ("lm_head.weight", "model.embeddings.weight"):
        parameter = model.get_parameter(name)
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, before[name])
        # Rows without a token keep their embedding: AdamW's step there is weight decay alone.
        moved = (parameter - before[name]).abs().amax(1) > 1e-2
        assert moved[IDS.unique()].any()
    assert model.model.norm_f.weight.dtype == torch.bfloat16
    save_adapter(model, section, targets, SavedBase(str(base)), tmp_path, write=True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.embeddings.weight"):
        assert torch.equal(state[f"base_model.model.{name}"], model.get_parameter(name))


def test_the_file_of_whole_modules_is_as_peft_writes_it(base, tmp_path):
    section = AdapterSection(**WHOLE)
    model, targets = our_model(base, section)
    before = our_logits(model)
    train(model)
    save_adapter(model, section, targets, SavedBase(str(base)), tmp_path / "ours", write=True)
    peft = PeftModel.from_pretrained(plain(base), tmp_path / "ours")
    logits = our_logits(model)
    assert (logits - before).abs().max() > 0.1 * before.std()
    assert (plain_logits(peft) - logits).abs().max() < 1e-5 * logits.std()
    peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f"{side}/adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embeddings", "lm_head"]
    assert "`embeddings` and `lm_head` whole" in (tmp_path / "ours/README.md").read_text()


# -- going on from an adapter --------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [SMALL, ALL_TARGETS, WHOLE | {"rank_pattern": {"experts.up_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}],
    ids=["small", "all", "whole modules and patterns"],
)
def test_going_on_from_an_adapter_is_going_on(base, tmp_path, keys):
    section = AdapterSection(**keys)
    model, targets = our_model(base, section)
    train(model)
    save_adapter(model, section, targets, SavedBase(str(base)), tmp_path, write=True)
    again, _ = our_model(base, section, seed=7)
    load_adapter(again, section, tmp_path)
    check_adapter_dir(section.model_copy(update={"lora_model_dir": str(tmp_path)}), SHAPE)
    assert_same(trained(again), trained(model))
    train(model)
    train(again)
    assert_same(trained(again), trained(model))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj"], r".*layers\.\d\.mixer\.[qk]_proj"])
def test_an_adapter_of_plain_peft_is_read(base, tmp_path, targets):
    """A name that matches nothing is no fault to PEFT, as long as another matches."""
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=targets,
        target_parameters=["experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        modules_to_save=["lm_head"],
    )
    torch.manual_seed(3)
    peft = get_peft_model(plain(base), config)
    peft.save_pretrained(tmp_path)
    section = section_of(json.loads((tmp_path / "adapter_config.json").read_text()))
    model, _ = our_model(base, section)
    load_adapter(model, section, tmp_path)
    logits = our_logits(model)
    assert (plain_logits(peft) - logits).abs().max() < 1e-5 * logits.std()


@pytest.mark.parametrize("keys", [WHOLE | PATTERNS["the first counts"], ALL_TARGETS | {"lora_alpha": 3.0}])
def test_the_section_of_a_written_file_is_the_one_it_was_written_for(base, tmp_path, keys):
    section = AdapterSection(**keys)
    saved(base, section, tmp_path)
    found = section_of(json.loads((tmp_path / "adapter_config.json").read_text()))
    places = (linear_paths(SHAPE), expert_paths(SHAPE))
    assert find_targets(found, *places) == find_targets(section, *places)
    for path in (*places[0], *places[1]):
        assert strength_of(found, path) == strength_of(section, path)
    assert saved_modules(found) == saved_modules(section)


LATER = {
    "rank": ({"lora_r": 8}, "has rank 4 on model.layers.*, and this run rank 8"),
    "scaling": ({"lora_alpha": 3.0}, "scales model.layers.* by 2, and this run by 0.75"),
    "rsLoRA": ({"peft_use_rslora": True}, "by 2, and this run by 4"),
    "another target": ({"lora_target_modules": ("q_proj", "in_proj")}, "down_proj"),
    "a missing target": (
        {"lora_target_modules": ("k_proj", *SMALL["lora_target_modules"])},
        r"model\.layers\.2\.mixer\.k_proj",
    ),
    "no experts": ({"lora_target_parameters": ()}, r"model\.layers\.1\.mixer\.experts\.down_proj"),
    "a whole module": ({"lora_modules_to_save": ("lm_head",)}, "lm_head"),
    "a pattern": ({"rank_pattern": {"q_proj": 2}}, "has rank 4 on model.layers.2.mixer.q_proj, .* rank 2"),
}


@pytest.mark.parametrize("name", LATER)
def test_an_adapter_that_does_not_fit_the_run_is_refused_before_and_after_it_is_built(base, tmp_path, name):
    keys, message = LATER[name]
    saved(base, AdapterSection(**SMALL), tmp_path)
    section = AdapterSection(**SMALL | keys, lora_model_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=f"^lora_model_dir: .*{message}"):
        check_adapter_dir(section, SHAPE)
    model, _ = our_model(base, section)
    with pytest.raises(ConfigError, match=f"^adapter: .*{message}"):
        load_adapter(model, section, tmp_path)


def test_an_adapter_of_another_base_is_refused_by_the_first_shape(base, tmp_path):
    section = AdapterSection(**SMALL)
    saved(base, section, tmp_path)
    model, _ = build(tiny_config(moe_intermediate_size=64), section, Precision(), CPU)
    with pytest.raises(
        ConfigError,
        match=r"another base: model\.layers\.1\.mixer\.experts\.up_proj has shape \(8, 32, 64\) there, "
        r"and \(8, 64, 64\) here",
    ):
        load_adapter(model, section, tmp_path)


def test_an_adapter_of_a_longer_base_is_refused(base, tmp_path):
    section = AdapterSection(**SMALL)
    saved(base, section, tmp_path)
    model, _ = build(tiny_config(pattern="ME*-M"), section, Precision(), CPU)
    with pytest.raises(
        ConfigError, match=r"has model\.layers\.5\.mixer\.experts\.down_proj, which is no tar"
    ):
        load_adapter(model, section, tmp_path)


def break_folder(kind: str, folder: Path) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if kind == "the run's folder":
        inside = folder / "adapter"
        inside.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).rename(inside / file)
        return folder
    if kind == "no tensors":
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "not json":
        path.write_text("{")
    elif kind == "another method":
        path.write_text(json.dumps(config | {"peft_type": "IA3"}))
    elif kind == "dora":
        path.write_text(json.dumps(config | {"use_dora": True}))
    elif kind == "pissa":
        path.write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    elif kind == "narrowed":
        path.write_text(json.dumps(config | {"layers_to_transform": [1]}))
    elif kind == "rank 0":
        path.write_text(json.dumps(config | {"r": 0}))
    elif kind == "norms":
        path.write_text(json.dumps(config | {"modules_to_save": ["norm_f"]}))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("the run's folder", "adapter_config.json does not exist; give .*/adapter$"),
        ("no tensors", "adapter_model.safetensors does not exist"),
        ("not json", "is not JSON"),
        ("another method", "has peft_type 'IA3', and LORA only"),
        ("dora", "has use_dora: True, which is not read here"),
        ("pissa", "init_lora_weights 'pissa_niter_4', which changes the base"),
        ("narrowed", r"has layers_to_transform: \[1\], which is not read here"),
        ("rank 0", "has r: 0, which no LoRA has"),
        ("norms", "'norm_f' cannot be trained whole"),
    ],
)
def test_a_folder_that_is_no_usable_adapter_is_refused(base, tmp_path, kind, message):
    folder = break_folder(kind, saved(base, AdapterSection(**SMALL), tmp_path, steps=0))
    with pytest.raises(ConfigError, match=f"^lora_model_dir: .*{message}") as caught:
        check_adapter_dir(AdapterSection(**SMALL, lora_model_dir=str(folder)), SHAPE)
    assert "\n" not in str(caught.value)


def test_a_truncated_adapter_is_refused(base, tmp_path):
    section = AdapterSection(**SMALL)
    file = saved(base, section, tmp_path) / "adapter_model.safetensors"
    model, _ = our_model(base, section)
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.2.mixer.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lacks lora_B of model.layers.2.mixer.q_proj"):
        load_adapter(model, section, tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, section, tmp_path)
