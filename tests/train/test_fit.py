"""Runs that no GPU of the cluster can hold are refused; where that is not known, none is."""

from pathlib import Path

import pytest

from nemo_ray.config.load import LoadedConfig
from nemo_ray.config.schema import Config
from nemo_ray.errors import ConfigError
from nemo_ray.plan.facts import find_shape
from nemo_ray.targets import read_shape
from nemo_ray.train import fit, launch
from nemo_ray.train.fit import check_fit
from nemo_ray.train.launch import Launch, Parts
from nemo_ray.train.resources import Demand
from tests.e2e.world import ASSETS

SHAPE, _ = find_shape("nemotron-3-nano-30b-a3b")
HEAD = {"CPU": 4.0}


def node(kind: str | None, gpus: float = 8.0) -> dict[str, float]:
    return {"CPU": 64.0, "GPU": gpus} | ({f"accelerator_type:{kind}": 1.0} if kind else {})


def check(*nodes: dict[str, float], workers: int = 1, gpu: float = 1.0, **keys: object) -> None:
    config = Config(
        base_model="nano",
        datasets=[{"path": "y"}],
        sequence_len=8192,
        gradient_checkpointing=True,
        **{"adapter": "lora", "lora_target_modules": ["q_proj"]} | keys,
    )
    check_fit(config, SHAPE, Demand(workers, gpu > 0, {"CPU": 1.0, "GPU": gpu}), nodes)


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"about 62\.\d GiB on each of 1 GPU\(s\), and l40s has 44\.4"):
        check(HEAD, node("L40S"))
    with pytest.raises(ConfigError, match="--force tries all the same"):
        check(node("H100"), adapter=None)
    with pytest.raises(ConfigError, match=r"has 39\.5 for it"):  # two workers on one GPU
        check(node("H100"), gpu=0.5)
    with pytest.raises(ConfigError):
        check(node("L40S"), workers=8, dp_shard_size=1)


def test_what_fits_is_not() -> None:
    check(HEAD, node("H100"))
    check(node("L40S"), workers=8)  # spread over some of them
    check(node("L40S"), node("H100"))  # it may get the larger one
    check(node("A100-80G"))
    check(node("L40S"), load_in_4bit=True, quantize_moe_experts=True, adapter="qlora")


@pytest.mark.parametrize("kind", ["A100", "TPU-X", None])
def test_where_the_memory_is_not_known_nothing_is_said(kind: str | None) -> None:
    check(node(kind))


def test_on_cpus_nothing_is_said() -> None:
    check(HEAD, gpu=0.0)


def test_the_kind_that_is_asked_for_counts() -> None:
    with pytest.raises(ConfigError, match="l40s"):
        check(node("L40S"), node("H100"), ray={"accelerator_type": "L40S"})


def test_training_asks_before_it_takes_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch.session, "start_local", lambda *_, **__: None)
    monkeypatch.setattr(launch.session, "nodes", lambda: [node("L40S")])
    monkeypatch.setattr(launch.resources, "gpus_here", lambda environ: 1)
    config = Config(
        base_model="nano",
        datasets=[{"path": "y"}],
        output_dir=str(tmp_path),
        sequence_len=8192,
        adapter="lora",
        lora_target_modules=["q_proj"],
        gradient_checkpointing=True,
    )
    loaded = LoadedConfig(config, ())
    with pytest.raises(ConfigError, match="--force tries all the same"):
        Launch(loaded, Parts())._enter_ray(None, SHAPE)
    wanted, _ = Launch(loaded, Parts(), force=True)._enter_ray(None, SHAPE)
    assert wanted.use_gpu


def test_training_waits_for_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looks = [[HEAD], [HEAD], [HEAD, {"CPU": 8.0}]]
    monkeypatch.setattr(launch.session, "connect", lambda *_: None)
    monkeypatch.setattr(launch.session, "nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
    monkeypatch.setattr(launch, "check_nodes", lambda config: None)
    monkeypatch.setattr("nemo_ray.train.room._POLL_S", 0.0)
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    config = Config(
        base_model="nano",
        datasets=[{"path": "y"}],
        output_dir=str(tmp_path),
        ray={"num_workers": 6, "wait_for_nodes_s": 30.0, "use_gpu": False},
    )
    wanted, _ = Launch(LoadedConfig(config, ()), Parts())._enter_ray("head:6379", SHAPE)
    assert wanted.num_workers == 6 and asked == [[{"CPU": 1.0}] * 6, []]


@pytest.mark.parametrize(
    ("num_workers", "sequence_len", "fits"),
    [(1, 512, True), (20, 512, True), (1000, 512, False), (1, 2**24, False)],
)
def test_what_this_machine_cannot_hold_is_refused_before_ray_starts(
    num_workers: int, sequence_len: int, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[int] = []
    monkeypatch.setattr(fit, "available_bytes", lambda: 20 * 2**30)
    monkeypatch.setattr(launch.resources, "gpus_here", lambda environ: 0)
    monkeypatch.setattr(launch.session, "start_local", lambda cpus, *_, **__: started.append(cpus))
    monkeypatch.setattr(launch.session, "nodes", lambda: [{"CPU": float(started[-1])}])
    shape = read_shape(str(ASSETS / "base"))
    config = Config(
        base_model="tiny",
        datasets=[{"path": "y"}],
        output_dir=str(tmp_path),
        sequence_len=sequence_len,
        ray={"num_workers": num_workers},
    )
    if not fits:
        with pytest.raises(
            ConfigError, match=rf"in each of {num_workers} worker\(s\) .* has 20.0 left for all"
        ):
            Launch(LoadedConfig(config, ()), Parts())._enter_ray(None, shape)
        assert not started
    Launch(LoadedConfig(config, ()), Parts(), force=not fits)._enter_ray(None, shape)
    assert len(started) == 1
