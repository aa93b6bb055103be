"""`nemo-ray plan`: what it says, and what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_ray.cli import main

ROOT = Path(__file__).resolve().parents[2]
NANO, SUPER = "configs/nemotron-3-nano-30b-a3b-lora.yaml", "configs/nemotron-3-super-120b-a12b-qlora.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_nano_on_one_h100(capsys):
    code, found = plan(capsys, NANO, "--price", "2.5")
    assert code == 0 and found["model"]["parameters"] == 31_577_937_344
    assert found["model"]["active"] == 3_227_751_872
    assert sum(found["model"]["by_kind"].values()) == found["model"]["parameters"]
    assert found["memory"]["fits"] and found["mesh"] == {"replicate": 1, "shard": 1}
    assert found["data"]["known"] is False and found["data"]["per"] == "100,000,000 tokens"
    hours = 1e8 / found["speed"]["tokens_per_s"] / 3600
    assert found["data"]["cost"] == pytest.approx(2.5 * hours)
    own, other = found["options"]
    assert own["recommended"] and (own["name"], other["name"]) == ("lora", "qlora")
    assert other["peak"] < own["peak"] and other["most_micro_batch_tokens"] > own["most_micro_batch_tokens"]


def test_what_does_not_fit_says_what_would(capsys):
    code, found = plan(capsys, NANO, "--gpu", "l40s")
    assert code == 1 and not found["memory"]["fits"] and found["memory"]["fewest_gpus"] == 2
    assert found["memory"]["most_micro_batch_tokens"] == 0
    own, other = found["options"]
    assert not own["recommended"] and other["recommended"]
    assert other["keys"] == {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}
    assert "by its data sheet" in found["speed"]["from"]
    assert main(["plan", NANO, "--gpu", "l40s"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "2 such GPUs hold it together" in said
    assert "as adapter=qlora load_in_4bit=true quantize_moe_experts=true" in said


def test_weights_are_spread_over_as_few_gpus_as_hold_them(capsys):
    assert plan(capsys, NANO, "--gpu", "h100", "--num-gpus", "8")[1]["mesh"] == {"replicate": 8, "shard": 1}
    _, found = plan(capsys, SUPER, "--gpu", "l40s", "--num-gpus", "8")
    assert found["mesh"] == {"replicate": 4, "shard": 2} and found["memory"]["classes"]["communication"] > 0
    _, found = plan(capsys, NANO, "dp_shard_size=4", "--num-gpus", "8")
    assert found["mesh"] == {"replicate": 2, "shard": 4}


def test_nothing_fits(capsys):
    code, found = plan(capsys, SUPER, "--gpu", "rtx4090")
    assert code == 1 and not any(option["recommended"] for option in found["options"])
    main(["plan", SUPER, "--gpu", "rtx4090"])
    assert "none of them fits" in capsys.readouterr().out


def test_small_local_data_is_counted(capsys, tmp_path):
    before = sorted(ROOT.rglob("prepared"))
    _, found = plan(capsys, "configs/quickstart.yaml", "max_steps=", "num_epochs=2")
    assert found["data"]["known"] and found["data"]["tokens"] == pytest.approx(2 * 612_000, rel=0.1)
    assert sorted(ROOT.rglob("prepared")) == before, "it writes nothing"
    _, found = plan(capsys, "configs/quickstart.yaml", "max_steps=10")
    assert found["data"]["tokens"] == 10 * 2 * 4 * 512


def test_far_from_what_was_measured_no_speed_is_told(capsys):
    _, found = plan(capsys, "configs/quickstart.yaml")
    assert found["speed"]["tokens_per_s"] is None and found["data"]["seconds"] is None
    assert main(["plan", "configs/quickstart.yaml"]) == 0
    assert "speed     not known: the nearest measured model is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h10"], "--gpu: 'h10' is not known; did you mean h100?"),
        (["--num-gpus", "0"], "--num-gpus: 0 is not valid"),
        (["--price", "-1"], "--price: -1 is not valid"),
        (["--price", "nan"], "--price: nan is not valid; give a finite number"),
        (["--price", "inf"], "--price: inf is not valid; give a finite number"),
        (["num_epochs=1e308"], "num_epochs: 1e+308 is not valid; give a number above 0, up to 1000000"),
        (["learning_rate=1e400"], "learning_rate: Infinity is not valid; give a finite number above 0"),
        (["sequence_len=1"], "sequence_len: 1 is not valid; give a whole number from 2"),
        (["learning_rate=0"], "learning_rate: 0 is not valid"),
        (["base_model=owner/other"], "base_model: owner/other is no folder with a config.json here"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, said):
    assert main(["plan", NANO, *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}") and told.count("\n") == 1


def test_it_answers_at_once_and_loads_neither_torch_nor_ray():
    code = (
        "import sys; from nemo_ray.cli import main; main(['plan', sys.argv[1]]); "
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, NANO], check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert time.monotonic() - began < 5
