"""Bins: every sample once, no bin too full, as few as first-fit-decreasing needs, about equally full."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_steerlm.train.packing import pack


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins, written down once more in the plainest way."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        for place, left in enumerate(room):
            if left >= length:
                room[place] -= length
                break
        else:
            room.append(capacity - length)
    return len(room)


def lengths_of(seed: int) -> tuple[list[int], int, int]:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(10, 2000))
    count = int(rng.integers(1, 200))
    if seed % 2:
        lengths = rng.integers(1, capacity + 1, count)
    else:
        lengths = np.clip(rng.lognormal(np.log(capacity / 10), 0.8, count).astype(int), 1, capacity)
    return lengths.tolist(), capacity, int(rng.integers(1, 9))


@pytest.mark.parametrize("seed", range(60))
def test_every_sample_once_and_no_bin_too_full(seed: int) -> None:
    lengths, capacity, multiple = lengths_of(seed)
    bins = pack(lengths, capacity, multiple)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in members) for members in bins]
    assert max(loads) <= capacity and loads == sorted(loads, reverse=True)
    assert len(bins) == -(-first_fit_decreasing(lengths, capacity) // multiple) * multiple
    assert bins == pack(np.array(lengths), capacity, multiple)
    shares = [sum(loads[rank::multiple]) for rank in range(multiple)]  # as they are dealt to ranks
    assert max(shares) - min(shares) <= max(loads) - min(loads)


def test_bins_are_about_equally_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 0.8, 256).astype(int), 20, 500)
    loads = [int(lengths[members].sum()) for members in pack(lengths, 2048, 8)]
    assert max(loads) <= 1.02 * lengths.sum() / len(loads)  # what pipeline stages pad all of them to


def test_the_longest_sample_alone_sets_the_bound() -> None:
    assert pack([], 8, 4) == [[], [], [], []]
    assert pack([8], 8, 2) == [[0], []]
    assert [sorted(members) for members in pack([8, 3, 3, 3], 8)] == [[0], [1, 2], [3]]
    with pytest.raises(AssertionError, match="a sample of 9 tokens in bins of 8"):
        pack([9], 8)
