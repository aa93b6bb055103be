"""A step without a finite loss or gradient changes nothing, and is written down; many in a row end a run."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from nemo_ray.config.schema import TrainSection
from nemo_ray.data.packing import build_pack
from nemo_ray.data.reader import PackReader
from nemo_ray.errors import NonFiniteError
from nemo_ray.run_dir import RunDir
from nemo_ray.train.metrics import FiguresOnTheWay
from nemo_ray.train.nonfinite import KEPT_STEPS, NonFiniteSteps
from nemo_ray.train.optim import AdamW, AdamW8bit, make_optimizer
from nemo_ray.train.update import Update
from nemo_ray.train.worker import WorkerSpec, run_worker
from tests.e2e.command import ROOT
from tests.e2e.compare import EXACT, train_rows
from tests.group import group_of_one, run_in_group
from tests.train.poison import lonely_token, packs_by_step, poisoned
from tests.train.runs import CPU, KilledError, Runs

BAD = 2
SHORT = {
    "max_steps": 4,
    "eval_steps": None,
    "test_datasets": [],
    "lora_r": 64,
}  # so large that 8 bits are used
OPTIMIZERS = {"adamw_torch": AdamW, "adamw_8bit": AdamW8bit}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("nonfinite"))


@pytest.fixture(scope="module")
def clean(runs: Runs) -> WorkerSpec:
    """What reads the same packs as all the runs here."""
    return runs.spec("clean", **SHORT)


@pytest.fixture(scope="module")
def one_bad(runs: Runs, clean: WorkerSpec) -> Path:
    """A base with which the second pack of step BAD alone has no finite loss."""
    return poisoned(runs.base, runs.folder / "one-bad", lonely_token(clean, BAD, 1))


@pytest.fixture(scope="module")
def two_bad(runs: Runs, clean: WorkerSpec) -> Path:
    """The same of steps BAD and BAD + 1."""
    tokens = (lonely_token(clean, step, 1) for step in (BAD, BAD + 1))
    return poisoned(runs.base, runs.folder / "two-bad", *tokens)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leave_out(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The optimizers are not called in that step."""
    for optimizer in OPTIMIZERS.values():
        calls = iter(range(1, 100))

        def call(
            self: Any, skip: torch.Tensor, calls: Any = calls, real: Any = optimizer.step_unless
        ) -> None:
            assert not skip.item()
            if next(calls) != step:
                real(self, skip)

        monkeypatch.setattr(optimizer, "step_unless", call)


def assert_equal_adapters(run: RunDir, wanted: RunDir) -> None:
    ours, theirs = (load_file(r.adapter_dir / "adapter_model.safetensors") for r in (run, wanted))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def assert_skipped(run: RunDir, wanted: RunDir) -> None:
    """Step BAD alone has no figures; what was read, and the rates, are those of the other run."""
    rows = train_rows(run)
    assert [row["nonfinite_steps"] for row in rows] == [int(row["step"] >= BAD) for row in rows]
    for row, other in zip(rows, train_rows(wanted), strict=True):
        assert all(row[name] == other[name] for name in (*EXACT, "epoch", "lr"))
        figures = [row["loss"], row["grad_norm"]]
        assert figures == [None, None] if row["step"] == BAD else all(map(math.isfinite, figures))
    assert "NaN" not in run.metrics_file.read_text()
    (notice,) = run.read_run()["notices"]
    assert notice.startswith(
        f"step {BAD} has no finite loss and no finite gradient: it was skipped (1 in a row"
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_bad_step_is_as_if_it_had_not_been_taken(
    runs: Runs, one_bad: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.run(f"{optimizer}-bad", base_model=str(one_bad), optimizer=optimizer, **SHORT)
    leave_out(monkeypatch, BAD)
    wanted = runs.run(f"{optimizer}-left-out", optimizer=optimizer, **SHORT)
    assert_equal_adapters(run, wanted)
    assert_skipped(run, wanted)
    assert [path.name for path in run.nonfinite_dir.iterdir()] == [f"step-{BAD}-rank-0.json"]


def test_the_batch_is_written_so_that_it_can_be_made_again(
    runs: Runs, clean: WorkerSpec, one_bad: Path
) -> None:
    run = runs.run("batch", base_model=str(one_bad), **{**SHORT, "max_steps": BAD})
    facts = json.loads((run.nonfinite_dir / f"step-{BAD}-rank-0.json").read_text())
    assert (facts["step"], facts["rank"], facts["loss"], facts["grad_norm"]) == (BAD, 0, None, None)
    chats = runs.train.read_text().splitlines()
    for found, pack in zip(facts["packs"], packs_by_step(clean)[BAD - 1], strict=True):
        arrays = [np.array(found[name], np.int32) for name in ("input_ids", "targets", "lengths")]
        again = build_pack(*arrays, pack.sample_rows, 0, clean.plan.sequence_len, clean.plan.pad_id)
        for name, value in vars(pack).items():
            assert np.array_equal(getattr(again, name), value), name
        assert found["source"] == str(runs.train)
        assert found["window"] in {window.key for window in clean.plan.windows}
        assert [row["file"] for row in found["rows"]] == [str(runs.train)] * len(pack.sample_rows)
        assert [row["row"] for row in found["rows"]] == pack.sample_rows.tolist()
        assert len(found["rows"]) == len(found["lengths"]) and max(pack.sample_rows) < len(chats)


def test_a_resumed_run_goes_on_counting(runs: Runs, one_bad: Path) -> None:
    settings = {**SHORT, "base_model": str(one_bad), "save_steps": 3}
    with pytest.raises(KilledError):
        runs.run("resumed", die_at_evaluation=3, **settings)
    run = runs.run("resumed", **settings)
    assert [(row["step"], row["nonfinite_steps"]) for row in train_rows(run)] == [
        (1, 0),
        (2, 1),
        (3, 1),
        (4, 1),
    ]


# -- the end -----------------------------------------------------------------------------------------


def checkpoint(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    """All tensors of one worker's checkpoint but the random states."""
    saved = load_file(run.checkpoint_dir(step) / "rank-0.safetensors")
    return {name: tensor for name, tensor in saved.items() if not name.startswith("rng/")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_too_many_in_a_row_end_the_run_with_the_weights_of_before(
    runs: Runs, two_bad: Path, optimizer: str
) -> None:
    name = f"{optimizer}-end"
    settings = {**SHORT, "base_model": str(two_bad), "optimizer": optimizer, "max_nonfinite_steps": 2}
    run = RunDir(runs.folder / "runs" / name)
    last = BAD + 1
    with pytest.raises(NonFiniteError) as told:
        runs.run(name, **settings, save_steps=1)
    assert str(told.value).startswith(
        f"max_nonfinite_steps: 2: step {last} has no finite loss and no finite grad"
    )
    for place in (run.nonfinite_dir, run.checkpoint_dir(last)):
        assert str(place) in str(told.value) and place.is_dir()
    assert {path.name for path in run.nonfinite_dir.iterdir()} == {
        f"step-{step}-rank-0.json" for step in (BAD, last)
    }
    assert run.checkpoint_steps() == list(range(1, last + 1))
    before, after = (checkpoint(run, step) for step in (BAD - 1, last))
    assert before.keys() == after.keys() and any("optimizer/" in name for name in before)
    for tensor_name, tensor in before.items():
        assert torch.equal(tensor, after[tensor_name]), tensor_name
    assert all(torch.isfinite(t).all() for t in after.values() if t.is_floating_point())
    # On a clean base it goes on from there.
    resumed = runs.run(name, **{**settings, "base_model": str(runs.base)})
    assert [row["nonfinite_steps"] for row in train_rows(resumed)] == [0, 1, 2, 2]


def assert_ends_with_the_weights_of_before(
    runs: Runs, name: str, device: torch.device, limit: int, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> None:
    """Of steps that are bad from the second on, the last one ends the run before a good one is taken."""
    settings = {**SHORT, "max_steps": 6, "max_nonfinite_steps": limit, **changes}
    clean = runs.spec(f"{name}-clean", **settings)
    tokens = [lonely_token(clean, step, 1) for step in range(2, 2 + limit)]
    base = poisoned(runs.base, runs.folder / f"base-{name}", *tokens)
    spec = runs.spec(name, **{**settings, "base_model": str(base)})
    states: list[dict[str, torch.Tensor]] = []
    real = Update.__call__

    def update(self: Update, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        figures = real(self, *args)
        named = {**self.trainee.parameters, **self.trainee.optimizer.named_states()}
        states.append({name: tensor.detach().clone() for name, tensor in named.items()})
        return figures

    monkeypatch.setattr(Update, "__call__", update)
    last = 1 + limit
    with group_of_one(), pytest.raises(NonFiniteError, match=f": step {last} has no finite loss"):
        run_worker(spec, device, lambda figures: None)
    run = RunDir(spec.output_dir)
    assert len(states) == last and run.checkpoint_steps() == [last]
    assert [row["nonfinite_steps"] for row in train_rows(run)] == list(range(last))
    saved = checkpoint(run, last)
    for key, tensor in states[0].items():
        assert all(torch.equal(tensor, later[key]) for later in states[1:]), key
        assert torch.equal(saved[key if key in saved else f"optimizer/{key}"], tensor.cpu()), key


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_good_step_comes_between_where_figures_arrive_late(
    runs: Runs, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FiguresOnTheWay, "are_here", False)  # as on a GPU
    assert_ends_with_the_weights_of_before(runs, f"late-{limit}", CPU, limit, monkeypatch)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_steps_at_the_very_beginning_leave_a_checkpoint_to_go_on_from(
    runs: Runs, clean: WorkerSpec, optimizer: str
) -> None:
    base = poisoned(runs.base, runs.folder / f"first-{optimizer}", lonely_token(clean, 1, 0))
    name = f"{optimizer}-first"
    settings = {**SHORT, "optimizer": optimizer, "max_nonfinite_steps": 1}
    with pytest.raises(NonFiniteError):
        runs.run(name, base_model=str(base), **settings)
    run = runs.run(name, **settings)
    assert [row["step"] for row in train_rows(run)] == [1, 2, 3, 4] and run.adapter_dir.is_dir()


def test_the_documented_program_finds_the_row(
    runs: Runs, clean: WorkerSpec, one_bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {**SHORT, "base_model": str(one_bad), "max_nonfinite_steps": 1}
    with pytest.raises(NonFiniteError):
        runs.run("documented", **settings)
    output_dir = str(runs.folder / "runs" / "documented")
    (runs.folder / "my-run.yaml").write_text(yaml.safe_dump(runs.settings(output_dir=output_dir, **settings)))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page.split("## Losses that are not finite")[1], re.DOTALL)
    monkeypatch.chdir(runs.folder)
    exec(compile(program, "troubleshooting.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    packs = packs_by_step(clean)[BAD - 1]
    assert [int(row) for _, _, row, _ in lines] == [int(row) for pack in packs for row in pack.sample_rows]
    assert {file for _, file, _, _ in lines} == {str(runs.train)}
    token = lonely_token(clean, BAD, 1)
    starts = np.flatnonzero(packs[1].input_ids == token)
    document = int(packs[1].seq_idx[starts[0]])
    bad = [int(row) for _, _, row, loss in lines if not math.isfinite(float(loss))]
    assert bad == [int(packs[1].sample_rows[document])]


# -- several workers -----------------------------------------------------------------------------------


def _train_both(rank: int, bad: WorkerSpec, wanted: WorkerSpec) -> None:
    run_worker(bad, CPU, lambda figures: None)
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, BAD)
        run_worker(wanted, CPU, lambda figures: None)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shard", [2, pytest.param(1, marks=pytest.mark.long)], ids=["sharded", "copies"])
def test_two_workers_skip_a_step_that_is_bad_on_one(runs: Runs, one_bad: Path, shard: int) -> None:
    settings = {**SHORT, "micro_batch_size": 1, "dp_shard_size": shard}
    specs = [
        runs.spec(f"{name}-{shard}", base_model=str(base), **settings)
        for name, base in (("two-bad", one_bad), ("two-left-out", runs.base))
    ]
    (runs.folder / f"group-{shard}").mkdir()
    run_in_group(_train_both, 2, runs.folder / f"group-{shard}", *specs, limit_s=280)
    run, wanted = (RunDir(spec.output_dir) for spec in specs)
    assert_equal_adapters(run, wanted)
    assert_skipped(run, wanted)
    files = [json.loads((run.nonfinite_dir / f"step-{BAD}-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [file["rank"] for file in files] == [0, 1]
    assert len({(pack["window"], pack["pack"]) for file in files for pack in file["packs"]}) == 2


# -- parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_left_out_leaves_no_trace_in_the_ones_that_follow(optimizer: str) -> None:
    def trained(*skips: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))
        section = TrainSection(optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
        made = make_optimizer({"weight": weight}, section, 0, 1)
        for skip in skips:
            weight.grad = torch.full_like(weight, torch.nan) if skip else 2 * weight.detach()
            made.step_unless(torch.tensor(skip))
            made.zero_grad()
        return weight.detach(), made.named_states()

    weight, states = trained(1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    wanted, wanted_states = trained(0.0, 0.0)
    assert torch.equal(weight, wanted) and not torch.equal(wanted, trained(0.0)[0])
    assert states.keys() == wanted_states.keys()
    for name, value in wanted_states.items():
        assert torch.equal(states[name], value), name


def test_only_the_newest_batches_are_kept_and_the_first_streaks_told(
    runs: Runs, clean: WorkerSpec, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    run.write_run({"notices": []})
    steps = NonFiniteSteps(TrainSection(), clean.plan, run, 0, 1)
    drawn = _step(clean)
    for step in range(1, 2 * KEPT_STEPS, 2):
        for skipped, loss in ((1, math.inf), (0, 1.0)):
            assert steps.add(step + 1 - skipped, loss, 1.0, drawn) == bool(skipped)
    for step in range(200, 210):
        steps.add(step, 1.0, math.nan, drawn)
    kept = {int(path.name.split("-")[1]) for path in run.nonfinite_dir.iterdir()}
    assert kept == {*range(21, 100, 2), *range(200, 210)} and len(kept) == KEPT_STEPS
    told = run.read_run()["notices"]
    assert len(told) == 10 and told[0].startswith("step 1 has no finite loss: ")
    assert told[-1].endswith("metrics.jsonl") and not told[-2].endswith("metrics.jsonl")


def test_the_step_that_may_end_the_run_is_waited_for(clean: WorkerSpec, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_run({"notices": []})
    steps = NonFiniteSteps(TrainSection(max_nonfinite_steps=3), clean.plan, run, 0, 1)
    waits = []
    for step, loss in enumerate((1.0, math.nan, 1.0, math.nan, math.nan, math.nan)):
        waits.append(steps.next_may_end_the_run)
        steps.add(step, loss, loss, _step(clean))
    assert waits == [False, False, False, False, False, True] and steps.too_many


def _step(spec: WorkerSpec) -> Any:
    reader = PackReader(spec.plan, seed=7, num_epochs=1, rank=0, world_size=1, packs_per_step=2, timeout_s=10)
    return reader.next_step()
