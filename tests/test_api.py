"""The commands from Python. What the commands do is tested by theirs; here is what is returned and raised."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from nemo_ray.api import plan, prepare, sweep, train
from nemo_ray.data.__main__ import main as prepare_command
from nemo_ray.errors import ClusterError, ConfigError

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
DEMO = ROOT / "nemo_ray" / "demo" / "assets"


def test_it_is_imported_without_torch_or_ray() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pandas'}"
    code = f"import sys, nemo_ray.api; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("call", [train, prepare, plan])
def test_what_is_refused_raises_and_a_mapping_stays_as_it_is(call) -> None:
    config = {"base_model": str(DEMO / "base"), "lora_rr": 4, "datasets": [{"path": "x.jsonl"}]}
    before = dict(config)
    with pytest.raises(ConfigError, match="lora_rr: 4: unknown key; did you mean lora_r"):
        call(config)
    assert config == before
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        call(Path("nowhere.yaml"))


def test_a_plan() -> None:
    found = plan(ROOT / "configs" / "nemotron-3-nano-30b-a3b-lora.yaml", gpu="h200", price=3.0, num_gpus=2)
    assert found.fits and 60e9 < found.peak_bytes < 141e9
    assert found.peak_bytes <= sum(found.memory_bytes.values()) < 1.1 * found.peak_bytes
    assert found.tokens_per_s > 30_000 and found.recommended["fits"]
    assert found.cost == pytest.approx(found.seconds / 3600 * 2 * 3.0)
    small = plan(ROOT / "configs" / "nemotron-3-nano-30b-a3b-lora.yaml", gpu="l40s")
    assert not small.fits and small.recommended["keys"]
    tiny = plan(ROOT / "configs" / "nemotron-3-super-120b-a12b-qlora.yaml", gpu="rtx4090")
    assert not tiny.fits and tiny.recommended is None


def test_prepared_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("sequence_len=512", f"output_dir={tmp_path / 'out'}", f"dataset_prepared_path={tmp_path / 'p'}")
    assert prepare_command([str(QUICKSTART), *keys]) == 0
    printed = capsys.readouterr().out
    found = prepare(QUICKSTART, *keys)
    assert f"{found.documents:,} documents, {found.tokens:,} tokens, {found.packs:,} packs" in printed
    assert f"{found.efficiency:.1%} of positions used" in printed
    assert f"{found.target_tokens / found.tokens:.1%} of tokens trained" in printed
    assert found.directory.startswith(str(tmp_path / "p")) and found.rejected == 0
    assert found.facts["held_out"]["documents"] > 0


def test_a_ray_of_the_caller_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    space = {"parameters": {"lora_r": [4, 8]}, "search": "grid"}
    for call, more in ((train, []), (prepare, []), (sweep, [f"tune={space}"])):
        with pytest.raises(ClusterError, match=r"call ray.shutdown\(\) first"):
            call(QUICKSTART, f"output_dir={tmp_path / 'out'}", *more)
    assert not ended and not (tmp_path / "out").exists()


@pytest.mark.e2e
@pytest.mark.long
def test_a_run(tmp_path: Path) -> None:
    keys = (f"output_dir={tmp_path / 'out'}", "max_steps=3", "evals_per_epoch=", "eval_steps=3")
    few = ("completion_prompts=", "saves_per_epoch=", "ray.num_workers=1", "gradient_accumulation_steps=1")
    found = train(QUICKSTART, *keys, *few)
    assert found.output_dir == str(tmp_path / "out") and found.step == found.exported_step == 3
    assert (Path(found.result) / "adapter_config.json").is_file()
    table = found.dataframe
    assert list(table["step"][table["loss"].notna()]) == [1, 2, 3]
    assert found.eval_loss == list(table["eval_loss"].dropna())[-1] < 6
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match="overwrite"):
        train(QUICKSTART, *keys, *few)
