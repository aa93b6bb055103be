"""What a run writes is the ecosystem's: plain PEFT and plain transformers load it and agree with us."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file

from nemo_ray.model.adapter import adapter_state
from nemo_ray.run_dir import RunDir
from tests.e2e.command import ROOT, TRAIN
from tests.e2e.compare import assert_loss_falls, assert_same_course, largest_differences
from tests.e2e.restored import (
    LOGITS_TOLERANCE,
    at_the_end,
    at_the_start,
    difference,
    held_out_documents,
    packed_logits,
    plain_logits,
    plain_model,
    process_group,
)
from tests.e2e.world import DEMO_BASE, World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

QUICKSTART_TARGETS = "q_proj, k_proj, v_proj, o_proj, in_proj"


def quickstart(world: World, name: str, *overrides: str) -> RunDir:
    """A few steps of the quickstart, unchanged but for its length and its place."""
    run = world.run_dir(name)
    shorter = ("max_steps=4", "evals_per_epoch=", "completion_prompts=", f"output_dir={run.path}")
    prepared = f"dataset_prepared_path={world.folder / 'prepared-quickstart'}"
    started = world.command(*TRAIN, str(ROOT / "configs" / "quickstart.yaml"), *shorter, prepared, *overrides)
    assert started.end() == 0, started.output
    assert started.leaves_nothing_behind(), started.tree()
    return run


def python_blocks(readme: Path) -> list[str]:
    """The code that a README shows."""
    return re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)


def assert_every_factor_moved(run: RunDir) -> None:
    """Each LoRA factor, of each expert, differs from what it was at the start."""
    before, after = at_the_start(run).parameters, at_the_end(run).parameters
    assert before.keys() == after.keys() and len(before) > 0
    for name, start in before.items():
        assert "lora_" in name
        if name.endswith("lora_B"):
            assert not start.any(), name
        moved = (after[name] - start).detach().abs()
        of_each_expert = moved.flatten(1).amax(1) if start.ndim == 3 else moved.amax()
        assert bool((of_each_expert > 0).all()), (name, of_each_expert)


def assert_peft_agrees(run: RunDir) -> None:
    """Plain PEFT on plain transformers gives our eval mode's logits, and the base alone does not."""
    trained = at_the_end(run).model
    saved = load_file(run.adapter_dir / "adapter_model.safetensors")
    assert not any(largest_differences(saved, adapter_state(trained)).values())
    documents = held_out_documents(DEMO_BASE)
    ours = packed_logits(trained, documents)
    base = plain_model(DEMO_BASE)
    without = plain_logits(base, documents)
    peft = plain_logits(PeftModel.from_pretrained(base, run.adapter_dir), documents)
    assert difference(ours, peft) < LOGITS_TOLERANCE
    assert difference(ours, without) > 100 * LOGITS_TOLERANCE


def test_the_quickstarts_adapter_in_plain_peft(world: World) -> None:
    run = quickstart(world, "quickstart")
    with process_group():
        assert_every_factor_moved(run)
        assert_peft_agrees(run)


@pytest.mark.soak
def test_an_adapter_on_out_proj_in_plain_peft(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quickstart(world, "out-proj", f"lora_target_modules=[{QUICKSTART_TARGETS}, out_proj]")
    loading, lifting = python_blocks(run.adapter_dir / "README.md")
    assert "PeftModel.from_pretrained(" in loading
    with pytest.raises(ValueError, match="out_proj"):  # so that the line is worth showing
        PeftModel.from_pretrained(plain_model(DEMO_BASE), run.adapter_dir)
    # Registered only to be put back at the end; what lifts the check is the README's own line.
    check = "_check_target_module_compatiblity"
    monkeypatch.setattr(LoraModel, check, getattr(LoraModel, check))
    exec(lifting, {})
    with process_group():
        assert_every_factor_moved(run)
        assert_peft_agrees(run)


OF_THE_WAY = 1e-2
"""How far apart two full fine-tunes may end, as a share of the way that a tensor went (seen: 9e-4)."""

# -- full fine-tuning -----------------------------------------------------------------------------

FULL = {
    "adapter": "none",
    "lora_target_modules": None,
    "lora_target_parameters": None,
    "lora_r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def full(world: World) -> RunDir:
    run = world.finished("full", **FULL)
    assert_loss_falls(run)
    return run


def test_a_full_fine_tune_in_plain_transformers(world: World, full: RunDir) -> None:
    documents = held_out_documents(world.base)
    with process_group():
        trained = at_the_end(full).model
    with torch.no_grad():
        for parameter in trained.parameters():  # trained in float32, written in bfloat16
            parameter.copy_(parameter.bfloat16())
    plain = plain_logits(plain_model(full.model_dir), documents)
    assert difference(packed_logits(trained, documents), plain) < LOGITS_TOLERANCE
    assert difference(plain_logits(plain_model(world.base), documents), plain) > 0.5


def test_a_full_fine_tune_keeps_the_bases_layout(world: World, full: RunDir) -> None:
    def layout(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
        tensors = load_file(folder / "model.safetensors")
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    assert layout(full.model_dir) == layout(world.base)
    files = [{path.name for path in folder.iterdir()} for folder in (full.model_dir, world.base)]
    assert files[0] == files[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (full.model_dir, world.base)]
    assert configs[0] == configs[1]


def test_a_full_fine_tune_moves_every_parameter(full: RunDir) -> None:
    with process_group():
        before, after = at_the_start(full).parameters, at_the_end(full).parameters
    same = [name for name, start in before.items() if torch.equal(start, after[name])]
    assert not same


@pytest.mark.soak
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "micro_batch_size": 1}])
def test_a_full_fine_tune_on_two_workers_is_the_same(
    world: World, full: RunDir, extra: dict[str, int]
) -> None:
    changes = {**FULL, "ray": {"num_workers": 2}, "micro_batch_size": 2, **extra}
    run = world.finished(f"full-two-workers-{len(extra)}", **changes)
    assert_same_course(run, full)
    with process_group():
        found, wanted = at_the_end(run).parameters, at_the_end(full).parameters
        start = at_the_start(full).parameters
    # Norms, not single values: AdamW divides rounding by rounding where a rare token has hardly a gradient.
    off = {
        name: float((found[name] - end).norm() / (end - start[name]).norm()) for name, end in wanted.items()
    }
    worst = max(off, key=lambda name: off[name])
    assert off[worst] < OF_THE_WAY, (worst, off[worst])
