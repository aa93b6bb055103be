"""The base model's weights: pre-trained on the demo's text by this project's own full fine-tune.

Takes about a quarter of an hour on two cores, so only `python -m nemo_ray.demo --base` does it.
Floating point differs between processors: the weights are compared by their loss on held-out
documentation, not by bytes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemo_ray.errors import NemoRayError

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN_CONFIG = REPOSITORY / "configs" / "demo-pretrain.yaml"
LOSS_TOLERANCE = 0.1  # nats a token: two runs on different processors end closer than this
_NUM_DOCUMENTS = 100


def rebuild_base(folder: Path, run_dir: Path) -> None:
    """Pre-train into `run_dir` and put model.safetensors beside the config in `folder`/base.

    The run reads the committed text, tokenizer and config, as configs/demo-pretrain.yaml names them.
    """
    if not PRETRAIN_CONFIG.is_file():
        raise NemoRayError(f"{PRETRAIN_CONFIG} is missing: the base is rebuilt from a source checkout")
    command = [sys.executable, "-m", "nemo_ray.train", str(PRETRAIN_CONFIG)]
    command += [f"output_dir={run_dir.resolve()}", "overwrite=true"]
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if code != 0:
        raise NemoRayError(f"pre-training ended with exit code {code}: {' '.join(command)}")
    shutil.copyfile(run_dir / "model" / "model.safetensors", folder / "base" / "model.safetensors")


def held_out_loss(model_folder: Path, chats: Path) -> float:
    """Mean loss in nats a token on the answers of the first held-out chats, as plain text.

    Runs plain transformers in float32, one document at a time.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.eval()
    total, num_tokens = 0.0, 0
    rows = chats.read_text(encoding="utf-8").splitlines()[:_NUM_DOCUMENTS]
    with torch.no_grad():
        for row in rows:
            text = json.loads(row)["messages"][-1]["content"]
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            if ids.shape[1] < 2:
                continue
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            total += float(loss) * (ids.shape[1] - 1)
            num_tokens += ids.shape[1] - 1
    return total / num_tokens
