"""A checkpoint is the same whatever layout wrote it, and every layout reads it."""

from pathlib import Path

import pytest
import torch

from nemo_ray.run_dir import RunDir
from nemo_ray.train.checkpoint import load_checkpoint
from nemo_ray.train.starting import take_over
from tests.group import group_of_one, run_in_group
from tests.train.saved import all_tensors, assert_equal, one_process, save, sharded


def _write_and_read(rank: int, folder: Path, layout: str, written_by: dict[str, int]) -> None:
    run = RunDir(folder / "run")
    take_over(run)
    torch.manual_seed(1000 + rank)
    parts = sharded(layout)
    noise = torch.get_rng_state()
    save(run, parts, step=written_by[layout])
    wanted = all_tensors(*parts)
    torch.manual_seed(5)
    for step in sorted(written_by.values()):
        again = sharded(layout, number=1)
        state = load_checkpoint(run.checkpoint_dir(step), *again)
        assert (state.step, state.cursor, state.data_hash) == (step, 4 * step, f"hash {step}")
        assert_equal(all_tensors(*again), wanted)
    if step == written_by[layout]:
        assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize("layout", ["4", "2x2"])
def test_shards_are_read_whole_and_by_other_layouts(tmp_path: Path, layout: str) -> None:
    """One process writes step 1, four write step 2 in their layout; both read both."""
    run, parts = RunDir(tmp_path / "run"), one_process()
    with group_of_one():
        take_over(run)
        save(run, parts, step=1)
    written_by = {layout: 2, "one": 1}
    run_in_group(_write_and_read, 4, tmp_path, tmp_path, layout, written_by, limit_s=240)
    files = {path.name for path in run.checkpoint_dir(2).glob("*.safetensors")}
    assert files == {f"rank-{rank}.safetensors" for rank in range(4)}  # each has random states at least
    again = one_process(number=1)
    with group_of_one():
        assert load_checkpoint(run.checkpoint_dir(2), *again).step == 2
    assert_equal(all_tensors(*again), all_tensors(*parts))
