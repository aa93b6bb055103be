"""QLoRA through the command: a 4-bit base over two workers, 8-bit optimizer states, and what comes of it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_ray.run_dir import RunDir
from tests.e2e.compare import assert_loss_falls, assert_same_course, train_rows
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

QLORA = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "quantize_moe_experts": True,
    "optimizer": "adamw_8bit",
    "ray": {"num_workers": 2},
    "micro_batch_size": 2,
}


@pytest.fixture(scope="module")
def qlora(world: World) -> RunDir:
    run = world.finished("qlora", **QLORA)
    assert_loss_falls(run)
    return run


def test_it_starts_where_the_dense_base_does(qlora: RunDir, reference: RunDir) -> None:
    first, dense = train_rows(qlora)[0], train_rows(reference)[0]
    assert first["data_hash"] == dense["data_hash"]
    assert first["loss"] == pytest.approx(dense["loss"], rel=0.02) and first["loss"] != dense["loss"]


@pytest.mark.soak
def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(world: World, qlora: RunDir) -> None:
    middle = qlora.complete_checkpoints()[0]
    rows = train_rows(world.finished("qlora-again", f"resume_from_checkpoint={middle}", **QLORA))
    wanted = train_rows(qlora)[int(middle.name.removeprefix("step-")) :]
    assert len(rows) == len(wanted) > 4
    assert [row["data_hash"] for row in rows] == [row["data_hash"] for row in wanted]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)


@pytest.mark.soak
def test_8_bit_states_of_two_workers_are_refused_by_one(world: World, qlora: RunDir) -> None:
    changed = {**QLORA, "ray": {"num_workers": 1}, "micro_batch_size": 4}
    started = world.train("qlora-on-one", f"resume_from_checkpoint={qlora.newest_checkpoint()}", **changed)
    assert started.end() == 1
    (line,) = started.errors
    assert "holds 8-bit optimizer states of 2 workers" in line and "set ray.num_workers: 2" in line


def test_the_adapter_is_merged_checked_and_answers(world: World, qlora: RunDir) -> None:
    merged = world.folder / "merged"
    export = world.command(
        *(sys.executable, "-m", "nemo_ray.export", str(qlora.path)),
        *("--merge", "--check", "--output", str(merged)),
    )
    assert export.end() == 0, export.output
    files = [load_file(folder / "model.safetensors") for folder in (merged, world.base)]
    assert files[0].keys() == files[1].keys()
    changed = [key for key in files[0] if not torch.equal(files[0][key], files[1][key])]
    assert any(".experts.7.down_proj" in key for key in changed) and any("in_proj" in key for key in changed)
    assert AutoModelForCausalLM.from_pretrained(merged).config.hybrid_override_pattern
    prompt = ("--max-new-tokens", "5", "What does os.path.join do?")
    answers = []
    for where in (("--adapter", str(qlora.path)), ("--model", str(merged))):
        answer = world.command(sys.executable, "-m", "nemo_ray.model.generate", *where, *prompt)
        assert answer.end() == 0, answer.output
        answers.append(answer.output)
    assert all("5 written" in answer for answer in answers)


def test_run_json_says_how_it_was_held(qlora: RunDir) -> None:
    facts = json.loads((qlora.path / "run.json").read_text())
    assert facts["config"]["load_in_4bit"] and facts["start"]["self_test_s"] < 20
    assert facts["model"]["total"] > facts["model"]["trainable"] > 0


@pytest.mark.soak
def test_one_worker_gives_the_same_curve(world: World, qlora: RunDir) -> None:
    """The bytes of a 4-bit base do not depend on who holds them; float32 states make the rest comparable."""
    keys = {**QLORA, "optimizer": "adamw_torch"}
    two = world.finished("qlora-32bit-two", **keys)
    one = world.finished("qlora-32bit-one", **{**keys, "ray": {"num_workers": 1}, "micro_batch_size": 4})
    assert_same_course(one, two)
