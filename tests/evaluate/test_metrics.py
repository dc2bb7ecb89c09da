"""Intervals and differences against scipy and figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nemo_steerlm.agreement import pearson
from nemo_steerlm.evaluate.metrics import bootstrap_interval, json_ready, paired_difference

NAN = math.nan

pytestmark = pytest.mark.filterwarnings("error")


def test_json_ready_knows_numpy() -> None:
    value = {
        "a": (np.float32(0.5), np.int64(3), np.bool_(True)),
        2: np.array([[1.0, NAN]]),
        "c": [math.inf, None, "x"],
    }
    ready = {"a": [0.5, 3, True], "2": [[1.0, None]], "c": [None, None, "x"]}
    assert json_ready(value) == ready


def test_interval_of_a_mean_is_the_one_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)
    assert [low, high] == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    narrow = bootstrap_interval(values, seed=1, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval_against_scipy() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=80)
    y = x + random.normal(size=80)
    wanted = stats.bootstrap(
        (x, y),
        lambda a, b: stats.pearsonr(a, b)[0],
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=5,
    ).confidence_interval
    assert bootstrap_interval(x, y, statistic=pearson, seed=5) == pytest.approx(list(wanted), abs=0.015)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for seed in range(120):
        low, high = bootstrap_interval(random.normal(1, 1, 60), seed=seed, confidence=0.9, resamples=200)
        hits += low <= 1 <= high
    assert 0.8 <= hits / 120 <= 0.97


def test_interval_of_what_does_not_exist() -> None:
    assert np.isnan(bootstrap_interval([], seed=0)).all()
    assert np.isnan(bootstrap_interval([1.0, 1.0], [1.0, 2.0], statistic=pearson, seed=0)).all()
    both = bootstrap_interval([1.0, 2.0, 3.0], statistic=lambda x: [x.mean(), NAN], seed=0, resamples=50)
    assert both[0][0] <= both[1][0] and np.isnan([both[0][1], both[1][1]]).all()


def test_paired_difference_averages_each_prompt_first() -> None:
    before = [1.0, 3.0, 5.0, NAN]
    after = [4.0, 5.0, 6.0, 1.0]
    result = paired_difference(
        before, after, seed=0, prompts_before=["a", "a", "b", "c"], prompts_after=["a", "b", "b", "c"]
    )
    assert result["n"] == 2  # prompt c has no score before
    assert result["gain"] == pytest.approx(((4 - 2) + (5.5 - 5)) / 2)
    assert result["interval"] == pytest.approx([0.5, 2.0])


def test_pairing_removes_what_prompts_have_in_common() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, 100)
    before, after = hard + random.normal(0, 0.1, 100), hard + 0.2 + random.normal(0, 0.1, 100)
    result = paired_difference(before, after, seed=0)
    assert result["gain"] == pytest.approx(np.mean(after) - np.mean(before))
    assert 0.1 < result["interval"][0] < 0.2 < result["interval"][1] < 0.3


def test_several_answers_of_a_prompt_are_not_independent() -> None:
    change = np.random.default_rng(1).normal(0, 1, 40)
    prompts = list(range(40)) * 10
    alone = paired_difference(np.zeros(40), change, seed=0)
    tenfold = paired_difference(np.zeros(400), np.tile(change, 10), seed=0, prompts_before=prompts)
    assert tenfold == {**alone, "gain": pytest.approx(alone["gain"]), "interval": pytest.approx(alone["interval"])}
