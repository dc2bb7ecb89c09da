"""How well two sets of attribute values agree: correlation, error, kappa, accuracy.

Arrays are `[n, K]` in schema order, NaN = missing; all sums run in float64. An undefined figure (the correlation with
a constant, the mean of nothing) is NaN. The formulas are scikit-learn's and scipy's to the last digits, which a test
checks; those take too long to import for a validation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_steerlm.attributes import Attribute, AttributeSchema

Floats = NDArray[np.float64]


def attribute_metrics(predicted: ArrayLike, target: ArrayLike, schema: AttributeSchema) -> dict[str, dict[str, float]]:
    """Compares predictions with the truth, attribute by attribute.

    Args:
        predicted: values `[n, K]`, NaN = missing.
        target: values `[n, K]`, NaN = missing. A row counts for an attribute where both have a value.
        schema: the K attributes; gives names and the range that rounded values are clamped to.

    Returns:
        For each name: pearson, spearman, mae, mse (of the values as they are), kappa (Cohen's with quadratic weights)
        and accuracy (both of rounded and clamped values), n (rows that counted).
    """
    predicted_NK, target_NK = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    shape = (len(target_NK), len(schema))
    assert predicted_NK.shape == target_NK.shape == shape, (predicted_NK.shape, target_NK.shape, shape)
    return {
        attribute.name: agreement(predicted_NK[:, k], target_NK[:, k], attribute) for k, attribute in enumerate(schema)
    }


def agreement(predicted: Floats, target: Floats, attribute: Attribute) -> dict[str, float]:
    """As `attribute_metrics`, for one attribute and arrays `[n]`."""
    both = ~(np.isnan(predicted) | np.isnan(target))
    x, y = predicted[both], target[both]
    x_level, y_level = levels(x, attribute), levels(y, attribute)
    return {
        "pearson": pearson(x, y),
        "spearman": spearman(x, y),
        "mae": _mean(np.abs(x - y)),
        "mse": _mean((x - y) ** 2),
        "kappa": quadratic_kappa(x_level, y_level),
        "accuracy": _mean((x_level == y_level).astype(np.float64)),
        "n": int(both.sum()),
    }


def levels(values: Floats, attribute: Attribute) -> Floats:
    """Values as a label holds them: rounded half to even and clamped to the attribute's range."""
    return np.clip(np.rint(values), attribute.low, attribute.high)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of two arrays `[n]`; NaN when either is constant."""
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    # Exact comparison: after subtracting a rounded mean a constant array is rarely all zeros.
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    first, second = first - first.mean(), second - second.mean()
    return float(np.clip(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)), -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two arrays `[n]`, ties share their mean rank; NaN when either is constant."""
    return pearson(_ranks(x), _ranks(y))


def quadratic_kappa(x: ArrayLike, y: ArrayLike) -> float:
    """Cohen's kappa with quadratic weights of two arrays `[n]` of whole numbers; NaN where chance agrees fully.

    One minus the mean squared difference over the one expected if both were shuffled. The usual table of counts is
    not needed: with these weights its sums are moments.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not len(first) or (np.ptp(first) == 0 and np.array_equal(first, second)):
        return math.nan
    expected = np.mean(first**2) + np.mean(second**2) - 2 * first.mean() * second.mean()
    return float(1 - np.mean((first - second) ** 2) / expected)


class RaterAgreement:
    """Krippendorff's alpha for numbers ("Computing Krippendorff's Alpha-Reliability", 2011), from running sums.

    The disagreement of ratings of one item against that of any two ratings. Items may have different annotators, and
    any number of them.

    Attributes:
        items: items with at least two ratings; others are ignored.
        ratings: number of ratings of those items.
    """

    def __init__(self) -> None:
        self.items = self.ratings = 0
        self._within = self._sum = self._squares = 0.0

    def add(self, ratings: Sequence[float]) -> None:
        """Add all ratings of one item."""
        count = len(ratings)
        if count < 2:
            return
        total, squares = sum(ratings), sum(rating * rating for rating in ratings)
        self.items += 1
        self.ratings += count
        self._within += (count * squares - total * total) / (count - 1)
        self._sum += total
        self._squares += squares

    def alpha(self) -> float:
        """1 = full agreement, 0 = chance, below 0 = disagreement; NaN where all ratings are equal."""
        spread = self.ratings * self._squares - self._sum**2
        return 1 - self._within * (self.ratings - 1) / spread if spread > 0 else math.nan


def _ranks(values: ArrayLike) -> Floats:
    # scipy.stats.rankdata gives the same numbers; its checks take longer than the ranks, 1000 times over
    _, place, count = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
