import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ray.data.packing import IGNORED, build_pack, filler_pack, pack


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_every_document_is_in_one_group_that_fits(lengths: list[int], capacity: int) -> None:
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in group) for group in groups]
    assert all(0 < total <= capacity for total in totals)
    # No two groups could have been one of the shape that was asked for: at most one is half empty.
    assert sum(2 * total <= capacity for total in totals) <= 1


@given(st.lists(st.integers(1, 30), max_size=60))
def test_bins_are_those_of_first_fit_decreasing(lengths: list[int]) -> None:
    room: list[int] = []
    bins: list[list[int]] = []
    for size in sorted(lengths, reverse=True):
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            room.append(30)
            bins.append([])
            fitting = len(bins) - 1
        room[fitting] -= size
        bins[fitting].append(size)
    assert [[lengths[index] for index in group] for group in pack(lengths, 30)] == bins


@pytest.mark.parametrize("mean", [60, 600])
def test_packs_of_lognormal_lengths_are_full(mean: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        count = int(256 * 4096 / mean)
        lengths = generator.lognormal(np.log(mean) - 0.5, 1.0, count).astype(int).clip(1)
        lengths = lengths[lengths <= 4096]
        groups = pack(lengths, 4096)
        assert lengths.sum() / (4096 * len(groups)) >= 0.995


def test_a_pack_as_drawn() -> None:
    #   ids        5 6 7 | 8 9 | pad pad pad
    #   targets    1 0 1 | 1 1 |
    pack_ = build_pack(
        np.array([5, 6, 7, 8, 9], np.int32),
        np.array([1, 0, 1, 1, 1], np.uint8),
        np.array([3, 2], np.int32),
        np.array([40, 2], np.int64),
        source=3,
        sequence_len=8,
        pad_id=0,
    )
    assert pack_.input_ids.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert pack_.labels.tolist() == [IGNORED, IGNORED, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    assert pack_.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert pack_.seq_idx.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert pack_.lengths.tolist() == [3, 2, 3]
    assert pack_.sources.tolist() == [3, 3] and pack_.sample_rows.tolist() == [40, 2]
    assert (pack_.num_tokens, pack_.num_targets) == (5, 2)
    for array in (
        pack_.input_ids,
        pack_.labels,
        pack_.position_ids,
        pack_.seq_idx,
        pack_.lengths,
        pack_.sources,
    ):
        assert array.dtype == np.int32
    assert pack_.sample_rows.dtype == np.int64


def test_a_full_pack_has_no_tail_and_a_filler_only_a_tail() -> None:
    ids = np.arange(4, dtype=np.int32)
    full = build_pack(ids, np.ones(4, np.uint8), np.array([4], np.int32), np.zeros(1, np.int64), 0, 4, 9)
    assert full.lengths.tolist() == [4] and full.num_targets == 3
    filler = filler_pack(4, 9)
    assert filler.input_ids.tolist() == [9] * 4 and filler.num_targets == filler.num_tokens == 0
    assert filler.lengths.tolist() == [4] and (filler.labels == IGNORED).all() and not len(filler.sample_rows)
