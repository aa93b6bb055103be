"""Where a run starts from: a hub id, an earlier adapter, whole modules; and bf16 over float32 masters."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from nemo_ray.run_dir import RunDir
from tests.e2e.command import TRAIN
from tests.e2e.compare import assert_loss_falls, assert_same_course, eval_rows, train_rows
from tests.e2e.restored import (
    LOGITS_TOLERANCE,
    at_the_end,
    difference,
    held_out_documents,
    packed_logits,
    plain_logits,
    plain_model,
    process_group,
)
from tests.e2e.world import World
from tests.hub_server import HubServer

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]


def test_a_hub_id_trains_as_its_folder_does(world: World, reference: RunDir) -> None:
    cache = world.folder / "hub-cache"
    cache.mkdir()
    with HubServer() as hub:
        commit = hub.add_folder("tester/base", world.base)
        config = world.write_yaml(output_dir=str(world.run_dir("hub").path), base_model="tester/base")
        started = world.command(*TRAIN, str(config), **hub.environ(cache))
        assert started.end() == 0, started.output
        assert len(hub.transfers("model.safetensors")) == 1
    run = world.run_dir("hub")
    assert_same_course(run, reference)
    assert json.loads((run.path / "run.json").read_text())["base_model_commit"] == commit
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tester/base", commit)


def test_a_run_goes_on_from_an_adapter(world: World, reference: RunDir) -> None:
    run = world.finished("from-adapter", lora_model_dir=str(reference.adapter_dir), max_steps=2)
    assert eval_rows(run)[0]["eval_loss"] == pytest.approx(eval_rows(reference)[-1]["eval_loss"], rel=1e-5)


def test_another_rank_than_the_adapters_is_refused_before_ray_starts(world: World, reference: RunDir) -> None:
    started = world.train("from-adapter-wrong", lora_model_dir=str(reference.adapter_dir), lora_r=4)
    assert started.end() == 2
    (line,) = started.errors
    assert "lora_model_dir" in line and "rank" in line and "starting" not in started.output


@pytest.mark.soak
def test_whole_modules_are_trained_and_load_in_plain_peft(world: World) -> None:
    run = world.finished("whole", lora_modules_to_save=["lm_head", "embeddings"], ray={"num_workers": 2})
    assert_loss_falls(run)
    saved = load_file(run.adapter_dir / "adapter_model.safetensors")
    base = load_file(world.base / "model.safetensors")
    head = saved["base_model.model.lm_head.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, base["lm_head.weight"].float())
    documents = held_out_documents(world.base)
    with process_group():
        ours = packed_logits(at_the_end(run).model, documents)
    theirs = plain_logits(PeftModel.from_pretrained(plain_model(world.base), run.adapter_dir), documents)
    assert difference(ours, theirs) < LOGITS_TOLERANCE


@pytest.mark.soak
def test_a_full_fine_tune_computes_in_bf16_over_float32_masters(world: World) -> None:
    names = ("lora_target_modules", "lora_target_parameters", "lora_r", "lora_alpha", "lora_dropout")
    keys = {"adapter": "none", **dict.fromkeys(names), "learning_rate": 3e-3, "ray": {"num_workers": 2}}
    bf16 = world.finished("full-bf16", bf16=True, max_steps=6, **keys)
    exact = world.finished("full-float32", bf16=False, max_steps=6, **keys)
    losses = [[row["loss"] for row in train_rows(run)] for run in (bf16, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    assert losses[0][-1] < 0.97 * losses[0][0]
    with process_group():
        masters = at_the_end(bf16).parameters
    assert {p.dtype for p in masters.values()} == {torch.float32}
    moved = [bool((p != p.bfloat16().float()).any()) for p in masters.values() if p.numel() > 100]
    assert all(moved), "what is kept is finer than bfloat16"
