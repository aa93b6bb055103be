"""A base is quantized while it is read: the process never holds more than a part of what is in the files."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from nemo_ray.config.schema import AdapterSection
from nemo_ray.model import saving
from nemo_ray.model.load import Precision, build, fill
from nemo_ray.model.saving import SavedBase, save_model
from tests.model.shapes import CPU, tiny_config

MIB = 2**20
SLACK_BYTES = 48 * MIB
"""For what quantizing a group takes on a CPU, and the allocator."""
_LOAD = """
import json, sys, torch
from nemo_ray.config.schema import AdapterSection
from nemo_ray.model import load
from nemo_ray.model.quant import bitsandbytes

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load.QUANTIZED_AT_ONCE_BYTES["cpu"] = 2**18
bitsandbytes()
torch.set_num_threads(1)
cpu = torch.device("cpu")
precision = load.Precision(torch.bfloat16, torch.bfloat16, linears_4bit=True, experts_4bit=True)
model, _ = load.build(load.read_model_config(sys.argv[1]), AdapterSection(), precision, cpu)
before = status("VmRSS")
load.fill(model, sys.argv[1], seed=0, device=cpu, adapter_seed=0)
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"grown": status("VmHWM") - before, "held": held}))
"""


def test_a_4bit_base_is_loaded_in_little_more_than_its_own_size_and_a_shard(
    tmp_path: Path, monkeypatch
) -> None:
    shard_bytes = 16 * MIB
    monkeypatch.setattr(saving, "SHARD_BYTES", shard_bytes)
    config = tiny_config(pattern="EE", hidden_size=512, moe_intermediate_size=512, n_routed_experts=64)
    config.save_pretrained(tmp_path / "shape")
    model, _ = build(config, AdapterSection(), Precision(torch.bfloat16, torch.bfloat16), CPU)
    fill(model, None, seed=3, device=CPU, adapter_seed=3)
    base = tmp_path / "base"
    save_model(model, config, SavedBase(str(tmp_path / "shape")), base, torch.bfloat16, write=True)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    del model
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(base)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    assert figures["held"] < 0.3 * stored and stored > 1.1 * (figures["held"] + largest + SLACK_BYTES)
    assert figures["grown"] < figures["held"] + largest + SLACK_BYTES, figures
