"""Agreement against scikit-learn, scipy and figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from nemo_steerlm.agreement import RaterAgreement, attribute_metrics, pearson, quadratic_kappa, spearman
from nemo_steerlm.attributes import AttributeSchema

SCHEMA = AttributeSchema.load({"quality": {"low": 0, "high": 4}, "humor": {"low": 1, "high": 3}})
NAN = math.nan

pytestmark = pytest.mark.filterwarnings("error")


def test_figures_by_hand() -> None:
    predicted = [[0.4, 2.0], [2.5, 9.0], [3.6, NAN], [1.0, 1.2], [NAN, 1.0]]
    target = [[0.0, 2.0], [3.0, 3.0], [4.0, 2.0], [NAN, 1.0], [2.0, 2.0]]
    result = attribute_metrics(predicted, target, SCHEMA)
    quality = result["quality"]  # rows 0, 1, 2: errors .4, -.5, -.4; levels 0, 2 (2.5 rounds to even), 4
    assert quality["n"] == 3
    assert quality["mae"] == pytest.approx(1.3 / 3)
    assert quality["mse"] == pytest.approx((0.16 + 0.25 + 0.16) / 3)
    assert quality["accuracy"] == pytest.approx(2 / 3)
    assert quality["spearman"] == pytest.approx(1)
    # mean squared difference 1/3; by chance: 20/3 + 25/3 - 2 * 2 * 7/3 = 17/3
    assert quality["kappa"] == pytest.approx(1 - 1 / 17)
    humor = result["humor"]  # rows 0, 1, 3, 4: 9.0 is clamped to 3 for the levels only
    assert humor["n"] == 4
    assert humor["mae"] == pytest.approx((0 + 6 + 0.2 + 1) / 4)
    assert humor["accuracy"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("seed", range(5))
def test_figures_against_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.integers(0, 5, (300, 2)).astype(float)
    predicted = target + random.normal(0, 1.2, target.shape)
    predicted[random.random(target.shape) < 0.2] = NAN
    target[random.random(target.shape) < 0.2] = NAN
    schema = AttributeSchema.load({"quality": {"low": 0, "high": 4}, "humor": {"low": 0, "high": 4}})
    for k, result in enumerate(attribute_metrics(predicted, target, schema).values()):
        both = ~np.isnan(predicted[:, k] + target[:, k])
        x, y = predicted[both, k], target[both, k]
        level = [min(max(round(value), 0), 4) for value in x]
        wanted = {
            "pearson": stats.pearsonr(x, y)[0],
            "spearman": stats.spearmanr(x, y)[0],
            "mae": metrics.mean_absolute_error(y, x),
            "mse": metrics.mean_squared_error(y, x),
            "kappa": metrics.cohen_kappa_score(level, y.astype(int), weights="quadratic"),
            "accuracy": metrics.accuracy_score(y.astype(int), level),
            "n": both.sum(),
        }
        assert result == pytest.approx(wanted, rel=1e-12)


def test_pearson_keeps_its_digits_far_from_zero() -> None:
    x = np.arange(50.0)
    y = np.sin(x)
    assert pearson(1e8 + x, y) == pytest.approx(stats.pearsonr(x, y)[0], rel=1e-9)
    few = np.array([1, 2, 4], np.float32)
    assert pearson(few, [1, 2, 4]) == pytest.approx(1.0, rel=1e-15)  # the last bit is the BLAS's


def test_what_does_not_exist_is_nan_and_null() -> None:
    constant = attribute_metrics([[0.1, NAN], [0.1, NAN], [0.1, NAN]], [[1, 2], [2, 2], [3, 2]], SCHEMA)
    assert math.isnan(constant["quality"]["pearson"]) and math.isnan(constant["quality"]["spearman"])
    assert constant["quality"]["kappa"] == 0.0
    assert constant["humor"]["n"] == 0 and math.isnan(constant["humor"]["mae"])
    assert math.isnan(quadratic_kappa([2, 2], [2, 2])) and quadratic_kappa([2, 2], [3, 3]) == 0.0
    assert math.isnan(spearman([], [])) and math.isnan(pearson([1.0], [2.0]))


def alpha(*items: list[float]) -> float:
    found = RaterAgreement()
    for ratings in items:
        found.add(ratings)
    return found.alpha()


def test_alpha_is_krippendorffs() -> None:
    # Four observers, twelve units, with gaps: the worked example of "Computing Krippendorff's Alpha-Reliability".
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[float(value) for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    assert alpha(*units) == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_the_distance_within_over_the_distance_of_all() -> None:
    random = np.random.default_rng(0)
    items = [list(random.normal(random.normal(0, 2), 1, count)) for count in random.integers(1, 6, 60)]
    rated = [ratings for ratings in items if len(ratings) > 1]
    every = np.concatenate(rated)

    def distance(values: np.ndarray) -> float:  # of two different ratings
        return float(np.mean([(a - b) ** 2 for i, a in enumerate(values) for j, b in enumerate(values) if i != j]))

    within = sum(len(ratings) * distance(np.array(ratings)) for ratings in rated) / len(every)
    assert alpha(*items) == pytest.approx(1 - within / distance(every), rel=1e-9)
    assert alpha([1, 1], [4, 4, 4]) == 1 and alpha([0, 4], [4, 0]) < 0
    assert math.isnan(alpha([2, 2], [2, 2])) and math.isnan(alpha([1], [2])) and math.isnan(alpha())
