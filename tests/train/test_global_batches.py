from __future__ import annotations

import numpy as np
import pytest

from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.train.global_batches import GlobalBatches


@pytest.mark.parametrize(
    ("count", "size", "pool"), [(100, 8, 4), (96, 8, 4), (7, 8, 2), (3, 8, 16), (1, 4, 1), (33, 1, 5), (50, 50, 2)]
)
def test_every_item_comes_once_an_epoch(count, size, pool):
    lengths = np.random.default_rng(0).integers(5, 500, count)
    batches = GlobalBatches(lengths, size, seed=3, pool=pool)
    steps = 6 * count // size + 3
    stream = [index for step in range(steps) for index in batches[step]]
    epochs = [epoch for step in range(steps) for epoch in batches.epochs(step)]
    assert all(len(batches[step]) == size for step in range(steps))
    for epoch in range(len(stream) // count):
        one = stream[epoch * count : (epoch + 1) * count]
        assert sorted(one) == list(range(count)) and set(epochs[epoch * count : (epoch + 1) * count]) == {epoch}


@pytest.mark.parametrize("weights", [(1.0, 2.5, 0.3), (0.5, 1.0, 3.0)])
def test_an_epoch_draws_each_file_as_often_as_asked(weights):
    counts = (10, 6, 21)
    shares = list(zip(counts, weights, strict=True))
    batches = GlobalBatches(np.arange(37) % 9 + 1, 5, seed=3, pool=2, shares=shares)
    drawn = [round(count * weight) for count, weight in shares]
    assert len(batches) == sum(drawn)
    epochs = 7
    stream = [index for step in range(epochs * len(batches) // 5 + 1) for index in batches[step]]
    file = np.repeat([0, 1, 2], counts)
    for epoch in range(epochs):
        one = stream[epoch * len(batches) : (epoch + 1) * len(batches)]
        assert np.bincount(file[one], minlength=3).tolist() == drawn
    seen = np.bincount(stream[: epochs * len(batches)], minlength=37)
    for number in range(3):
        assert np.ptp(seen[file == number]) <= 1
    again = GlobalBatches(np.arange(37) % 9 + 1, 5, seed=3, pool=2, shares=shares)
    assert [again[step] for step in (11, 2, 7)] == [stream[5 * step : 5 * step + 5] for step in (11, 2, 7)]
    plain = GlobalBatches(np.arange(37) % 9 + 1, 5, seed=3, pool=2)
    ones = GlobalBatches(np.arange(37) % 9 + 1, 5, seed=3, pool=2, shares=[(count, 1.0) for count in counts])
    assert [plain[step] for step in range(20)] == [ones[step] for step in range(20)]


def test_batches_are_reachable_in_any_order_and_depend_on_the_seed():
    lengths = np.arange(40) % 11
    one, two = GlobalBatches(lengths, 6, seed=3), GlobalBatches(lengths, 6, seed=3)
    forward = [one[step] for step in range(30)]
    assert [two[step] for step in reversed(range(30))] == forward[::-1]
    assert [GlobalBatches(lengths, 6, seed=4)[step] for step in range(30)] != forward
    assert forward[:6] != forward[20:26]


@pytest.mark.parametrize("count", [4096, 4100])
def test_lengths_within_a_batch_are_alike_and_the_order_of_batches_is_not(count):
    lengths = np.random.default_rng(1).lognormal(5, 0.6, count).astype(int) + 1
    size = 32

    def padding(pool):
        batches = GlobalBatches(lengths, size, seed=0, pool=pool)
        rows = [lengths[batches[step]] for step in range(3 * count // size)]
        return sum(r.max() * size for r in rows) / sum(r.sum() for r in rows), [r.mean() for r in rows]

    sorted_cost, means = padding(16)
    plain = np.random.default_rng(2).permutation(lengths)[:4096].reshape(-1, size)
    random_cost = plain.max(1).sum() * size / plain.sum()
    assert random_cost > 2.5 and abs(padding(1)[0] - random_cost) < 0.2  # padding in multiples of the real tokens
    assert sorted_cost < 1.35
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_bad_batch_settings():
    with pytest.raises(DataError):
        GlobalBatches([], 4, seed=0)
    with pytest.raises(ConfigError):
        GlobalBatches([1], 0, seed=0)
