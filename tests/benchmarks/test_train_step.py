"""The benchmark of a training step runs on a CPU, and its figures agree with each other."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import train_step
from nemo_ray.plan import count_active, count_base

ROOT = Path(__file__).resolve().parents[2]
GPU_ONLY = {"peak_reserved_gib", "peak_allocated_gib", "matmul_tflops", "mfu", "gpu_busy", "profile"}


def run(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    """The command on the tiny model: its JSON and what it printed."""
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/train_step.py", "--model", "tiny", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def assert_consistent(side: dict, tokens: int, steps: int, warmup: int) -> None:
    times = side["measured"]["times_ms"]
    assert len(times) == steps and len(side["warmup"]["times_ms"]) == warmup
    assert side["step_ms"] == statistics.median(times) > 0
    assert side["tokens_per_step"] == tokens
    assert side["tokens_per_s"] * side["step_ms"] / 1e3 == pytest.approx(tokens)
    assert sum(times) <= 1e3 * side["measured"]["wall_s"]
    losses = side["warmup"]["losses"] + side["measured"]["losses"]
    assert len(losses) == steps + warmup
    assert all(4 < loss < 8 for loss in losses), "random ids: about the logarithm of the vocabulary"
    assert not GPU_ONLY & side.keys()


def test_both_sides_compute_the_same_loss(tmp_path):
    """One document a pack: without the kernels, plain transformers cannot keep documents apart."""
    arguments = ("--tokens", "256", "--adapter", "lora", "--compare", "peft", "--steps", "3", "--warmup", "1")
    report, printed = run(tmp_path, *arguments, "lora_r=4")
    assert report["config"]["lora_r"] == 4
    assert {"python", "torch", "transformers", "peft"} <= report["versions"].keys() and report["device"]
    ours, theirs = report["sides"]["nemo_ray"], report["sides"]["peft"]
    for side in (ours, theirs):
        assert_consistent(side, tokens=256, steps=3, warmup=1)
        flop = side["tokens_per_s"] * 4 * report["flop"]["active_parameters"]
        assert side["model_tflops"] == pytest.approx(flop / 1e12)
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert ours["measured"]["losses"][-1] == pytest.approx(theirs["measured"]["losses"][-1], rel=1e-3)
    assert "tokens/s" in printed and "MFU" not in printed


def test_four_bits_on_skewed_experts_and_natural_lengths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["--model", "tiny", "--tokens", "128", "--adapter", "qlora", "--mamba", "--skew", "0.1"]
    arguments += ["--documents", "natural", "--steps", "2", "--warmup", "1", "--limit-s", "120"]
    arguments += ["micro_batch_size=2", "gradient_accumulation_steps=2", "--out", str(tmp_path / "out.json")]
    assert train_step.main(arguments) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["sides"].keys() == {"nemo_ray"}
    side = report["sides"]["nemo_ray"]
    assert_consistent(side, tokens=512, steps=2, warmup=1)
    assert side["setup"] == "4-bit base"
    assert side["routing"]["hot_experts"] == 2 and side["routing"]["experts"] == 16
    assert side["routing"]["share"] == pytest.approx(0.5, abs=0.05)
    assert "2 of 16 experts took" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mini"], "--model: 'mini' is no model; give nano, super, tiny"),
        (["--tokens", "8"], "--tokens: 8 is not valid; give 16 to"),
        (["--tokens", "many"], "--tokens: invalid int value"),
        (["--steps", "0"], "--steps: 0 is not valid; give 1 or more"),
        (["--warmup", "-1"], "--warmup: -1 is not valid"),
        (["--documents", "1"], "--documents: '1' is not valid; give 2 or more, or natural"),
        (["--skew", "0.5"], "--skew: 0.5 is not valid; give between 0 and 0.5"),
        (["--limit-s", "0"], "--limit-s: 0.0 is not valid"),
        (["--adapter", "dora"], "--adapter: invalid choice: 'dora'"),
        (["--adapter", "none", "--compare", "peft"], "--compare: peft trains adapters"),
        (["lora_rank=4"], "lora_rank"),
        (["--model", "tiny", "lora_target_modules=[gate]"], "lora_target_modules: 'gate' matches nothing"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert train_step.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_a_side_that_ran_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    def full(config, device, folder):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1.21 GiB")

    monkeypatch.setitem(train_step.SIDES, "peft", full)
    arguments = train_step.parse(["--model", "tiny", "--side", "peft", "--folder", str(tmp_path)])
    assert train_step.side_process(arguments) == 0
    failed = json.loads((tmp_path / "result.json").read_text())
    whole = {"tokens_per_s": 9000.0, "step_ms": 28.4, "first_loss": 5.5, "setup": "bf16 base"}
    sides = {"nemo_ray": whole, "peft": failed}
    flop = {"active_parameters": 10**9, "per_token": 4 * 10**9, "rule": "4 FLOP"}
    for side in sides.values():
        train_step.add_rates(side, flop)
    capsys.readouterr()
    train_step.print_table(sides, flop)
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == ["nemo_ray", "9,000", "28.4", "36", "54", "5.5000"]
    assert rows[2].split()[:4] == ["peft", "out", "of", "memory"]


def test_a_side_that_takes_too_long_is_ended():
    assert train_step.measure("nemo_ray", ["--model", "tiny"], 0.1) == {"failed": "took more than 0.1 s"}


def test_a_token_meets_a_tenth_of_nano():
    shape = json.loads(train_step.SHAPES["nano"].read_text())
    assert count_base(shape) == pytest.approx(31.6e9, rel=0.01)
    assert count_active(shape) == pytest.approx(3.2e9, rel=0.02)


# -- documents -----------------------------------------------------------------------------------


@given(st.integers(2, 3000), st.sampled_from(["natural", "2", "100", "1024"]), st.integers(0, 5))
def test_documents_fill_a_pack(tokens, documents, seed):
    generator = np.random.default_rng(seed)
    lengths = train_step.draw_lengths(documents, tokens, generator)
    assert sum(lengths) == tokens and min(lengths) >= 1
    pack = train_step.make_pack(lengths, 50, generator)
    assert pack.lengths.tolist() == lengths and pack.num_tokens == tokens
    assert pack.num_targets == tokens - len(lengths), "all but the first of each"


def test_natural_lengths_differ_from_step_to_step():
    generator = np.random.default_rng(0)
    first, second = (train_step.draw_lengths("natural", 8192, generator) for _ in range(2))
    assert first != second and len(set(first)) > 5
