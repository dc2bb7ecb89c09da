"""Figures and grouped intervals against scipy, scikit-learn and plain resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from nemo_steerlm.agreement import agreement
from nemo_steerlm.attributes import Attribute
from nemo_steerlm.evaluate.grouped import figures, folds

QUALITY = Attribute("quality", low=0, high=4)


def rows(n: int = 400, groups: int = 80, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    group = random.integers(0, groups, n)
    common = random.normal(0, 1, groups)[group]
    label = np.clip(np.rint(2 + common + random.normal(0, 0.7, n)), 0, 4)
    length = np.exp(4 + 0.5 * label + random.normal(0, 0.8, n))
    predicted = 1 + 0.4 * label + 0.2 * np.log(length) + random.normal(0, 0.4, n)
    return predicted, label, length, group


def everything(seed: int = 0, resamples: int = 0, **of: int) -> dict:
    predicted, label, length, group = rows(**of)
    return figures(predicted, label, length, group, folds(group), QUALITY, seed=seed, resamples=resamples)


def test_figures_from_sums_are_those_of_the_rows() -> None:
    from nemo_steerlm.evaluate import grouped

    predicted, label, length, group = rows()
    result, z = everything(), np.log(length)
    sums = {k: v.sum() for k, v in grouped._columns(predicted, label, z, {"mean": z, "length": z}, QUALITY).items()}
    from_sums = grouped._statistics(sums)
    for name in ("pearson", "mse", "mae", "kappa", "accuracy"):  # once from rows, once from sums
        assert from_sums[name] == pytest.approx(agreement(predicted, label, QUALITY)[name], rel=1e-10), name
    line = stats.linregress(predicted, label)
    assert result["slope"] == pytest.approx(line.slope)
    assert result["spread"] == pytest.approx(predicted.std() / label.std())
    assert result["bias"] == pytest.approx((predicted - label).mean())

    def residual(of: np.ndarray) -> np.ndarray:
        return of - LinearRegression().fit(label[:, None], of).predict(label[:, None])

    assert result["length_partial"] == pytest.approx(stats.pearsonr(residual(predicted), residual(z))[0])
    assert result["length_label"] == pytest.approx(stats.pearsonr(label, z)[0])
    assert result["length_predicted"] == pytest.approx(stats.pearsonr(predicted, z)[0])


def test_reliability_and_expected_calibration_error() -> None:
    result = everything()
    assert sum(one["n"] for one in result["bins"]) == result["n"] == 400
    predicted, label, _, _ = rows()
    chosen = (predicted >= 2.0) & (predicted < 2.4)
    third = next(one for one in result["bins"] if one["low"] == pytest.approx(2.0))
    assert third["label"] == pytest.approx(label[chosen].mean()) and third["n"] == chosen.sum()
    error = sum(one["n"] * abs(one["predicted"] - one["label"]) for one in result["bins"]) / 400
    assert result["ece"] == pytest.approx(error)


def test_baselines_never_see_the_group_they_are_judged_on() -> None:
    predicted, label, length, group = rows()
    fold = folds(group)
    assert sorted(np.unique(fold)) == [0, 1, 2, 3, 4]
    assert all(len(np.unique(fold[group == one])) == 1 for one in np.unique(group))
    baseline, z = np.empty(len(label)), np.log(length)[:, None]
    for one in range(5):
        baseline[fold == one] = LinearRegression().fit(z[fold != one], label[fold != one]).predict(z[fold == one])
    result = everything()
    assert result["floor"]["length"]["mse"] == pytest.approx(((baseline - label) ** 2).mean())
    assert result["floor"]["length"]["pearson"] == pytest.approx(stats.pearsonr(baseline, label)[0])
    assert result["skill_length"] == pytest.approx(1 - result["mse"] / result["floor"]["length"]["mse"])
    assert result["floor"]["mean"]["mse"] > label.var()  # of other rows' mean


def test_intervals_are_those_of_a_plain_bootstrap_over_groups() -> None:
    predicted, label, length, group = rows()
    result = everything(resamples=400)
    random = np.random.default_rng(7)
    members = [np.flatnonzero(group == one) for one in np.unique(group)]
    drawn: dict[str, list[float]] = {"pearson": [], "spearman": [], "mse": [], "kappa": []}
    for _ in range(400):
        chosen = np.concatenate([members[one] for one in random.integers(0, len(members), len(members))])
        measured = agreement(predicted[chosen], label[chosen], QUALITY)
        for name in drawn:
            drawn[name].append(measured[name])
    for name, values in drawn.items():
        spread = float(np.std(values))
        assert result["interval"][name] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.5 * spread), name
        assert result["interval"][name][0] < result[name] < result["interval"][name][1]
    assert everything(resamples=400) == result != everything(resamples=400, seed=1)


def test_weighted_ranks_are_scipys_of_the_repeated_rows() -> None:
    from nemo_steerlm.evaluate.grouped import _WeightedRanks

    predicted, label, _, _ = rows(n=60)
    weights = np.random.default_rng(0).integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weights)
    expected = stats.spearmanr(np.rint(predicted)[repeated], label[repeated])[0]
    assert _WeightedRanks(np.rint(predicted), label).correlation(weights.astype(float)) == pytest.approx(expected)


def test_rows_of_one_group_count_once_in_an_interval() -> None:
    predicted, label, length, group = rows()
    alone = figures(predicted, label, length, group, folds(group), QUALITY, seed=0, resamples=300)
    predicted, label, length, group = (np.tile(column, 9) for column in (predicted, label, length, group))
    ninefold = figures(predicted, label, length, group, folds(group), QUALITY, seed=0, resamples=300)
    assert ninefold["n"] == 9 * alone["n"] and ninefold["groups"] == alone["groups"]
    for name, interval in alone["interval"].items():
        assert ninefold["interval"][name] == pytest.approx(interval, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("case", ["constant prediction", "constant label", "one row", "one group"])
def test_what_does_not_exist_is_nan_without_a_warning(case: str) -> None:
    import warnings

    predicted, label, length, group = rows(n=40, groups=1 if case == "one group" else 10)
    if case == "constant prediction":
        predicted[:] = 0.1
    if case == "constant label":
        label[:] = 2.0
    if case == "one row":
        predicted, label, length, group = predicted[:1], label[:1], length[:1], group[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = figures(predicted, label, length, group, folds(group), QUALITY, seed=0, resamples=20)
    assert math.isfinite(result["mse"]) and math.isfinite(result["bias"])
    if case != "one group":
        assert math.isnan(result["pearson"]) and np.isnan(result["interval"]["spearman"]).all()
    else:
        assert math.isnan(result["skill_mean"]) and math.isnan(result["floor"]["length"]["mse"])
