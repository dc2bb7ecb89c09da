"""Figures of one attribute with intervals that resample groups (prompts, trees), not rows.

Answers to one prompt are not independent: a bootstrap over rows gives intervals that are too narrow. All figures but
Spearman's are functions of sums over rows, so a resample is the product of its counts with each group's sums; ranks
are recomputed, with weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats, agreement, levels
from nemo_steerlm.attributes import Attribute
from nemo_steerlm.calibration import least_squares

BINS = 10  # of the reliability diagram, equally wide over the attribute's range
FOLDS = 5
_BATCH = 64  # resamples drawn at once
_CONFIDENCE = 0.95


def folds(group: np.ndarray) -> np.ndarray:
    """A fold number for each row `[n]`, each group in one fold; all -1 with fewer than two groups."""
    count = min(FOLDS, len(np.unique(group)))
    fold = np.full(len(group), -1)
    if count < 2:
        return fold
    from sklearn.model_selection import GroupKFold

    for number, (_, held_out) in enumerate(GroupKFold(count).split(group, groups=group)):
        fold[held_out] = number
    return fold


def by_the_other_folds(fold: np.ndarray, fit: Any, x: Floats, y: Floats) -> Floats:
    """Cross-fitted predictions `[n]`: each row by the function that `fit(x, y)` returns for the other folds' rows."""
    result = np.full(len(x), np.nan)
    for number in np.unique(fold[fold >= 0]):
        rest, mine = fold != number, fold == number
        if rest.any():
            result[mine] = fit(x[rest], y[rest])(x[mine])
    return result


def mean_baseline(x: Floats, y: Floats) -> Any:
    """Predicts the mean label."""
    return lambda new: np.full(len(new), y.mean())


def line_baseline(x: Floats, y: Floats) -> Any:
    """Predicts by least squares on `x`."""
    slope, intercept = least_squares(x, y)
    return lambda new: slope * new + intercept


def figures(
    predicted: Floats, label: Floats, length: Floats, group: np.ndarray, fold: np.ndarray, attribute: Attribute,
    *, seed: int, resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures of one attribute on one dataset.

    Args:
        predicted, label: `[n]`, without NaN.
        length: characters of each response.
        group: rows of one group are resampled together.
        fold: from `folds`, for the baselines.
        attribute: name and range.
        seed, resamples: of the intervals; none with `resamples` 0.

    Returns:
        `agreement`'s figures; bias (mean of prediction - label); slope (of the label on the prediction: above 1 the
        predictions are shrunk to their mean, below 1 they are spread too far); spread (standard deviation of the
        predictions over that of the labels); ece (expected calibration error, in levels: the mean distance of mean
        prediction and mean label in a bin, weighted by its rows); skill_mean, skill_length (1 - MSE over that of the
        baseline); length_label, length_predicted (Pearson with log length), length_partial (of prediction and log
        length given the label). `interval` has [low, high] of each, `floor` the figures of the baselines, each row of
        which is predicted from the other folds, `bins` the reliability diagram.
    """
    log_length = np.log(np.maximum(length, 1.0))
    baselines = {
        "mean": by_the_other_folds(fold, mean_baseline, log_length, label),
        "length": by_the_other_folds(fold, line_baseline, log_length, label),
    }
    columns = _columns(predicted, label, log_length, baselines, attribute)
    result: dict[str, Any] = agreement(predicted, label, attribute)
    exact = _statistics({name: column.sum() for name, column in columns.items()})
    result |= {name: float(value) for name, value in exact.items() if name not in result}
    result["groups"] = len(np.unique(group))
    if resamples:
        result["interval"] = _intervals(columns, predicted, label, group, seed, resamples)
    result["floor"] = {name: agreement(values, label, attribute) for name, values in baselines.items()}
    for name in ("pearson", "spearman"):
        del result["floor"]["mean"][name]  # five constants: an artefact of the folds
    result["bins"] = reliability(predicted, label, attribute)
    return result


def reliability(predicted: Floats, label: Floats, attribute: Attribute) -> list[dict[str, float]]:
    """Mean prediction and mean label of the rows in each bin of predictions; empty bins are left out."""
    place, width = _bin(predicted, attribute), (attribute.high - attribute.low) / BINS
    return [
        {
            "low": attribute.low + width * number, "high": attribute.low + width * (number + 1),
            "n": int((place == number).sum()), "predicted": float(predicted[place == number].mean()),
            "label": float(label[place == number].mean()),
        }
        for number in np.unique(place).tolist()
    ]  # fmt: skip


def _bin(predicted: Floats, attribute: Attribute) -> np.ndarray:
    place = (predicted - attribute.low) / (attribute.high - attribute.low) * BINS
    return np.clip(place, 0, BINS - 1).astype(np.int64)


def _centred(values: Floats) -> Floats:
    return values - (values.mean() if np.ptp(values) > 0 else values[0])


def _columns(
    predicted: Floats, label: Floats, length: Floats, baselines: Mapping[str, Floats], attribute: Attribute
) -> dict[str, Floats]:
    """The columns to sum, `[n]` each: moments about a value near the mean, so that no digits are lost."""
    x, y, z = _centred(predicted), _centred(label), _centred(length)
    a, b = levels(predicted, attribute) - attribute.low, levels(label, attribute) - attribute.low
    error, place = predicted - label, _bin(predicted, attribute)
    columns = {"n": np.ones(len(x)), "x": x, "y": y, "z": z, "a": a, "b": b}
    columns |= {p + q: columns[p] * columns[q] for p, q in ("xx", "yy", "zz", "xy", "xz", "yz", "aa", "bb", "ab")}
    columns |= {"error": error, "absolute": np.abs(error), "square": error**2, "same": (a == b).astype(np.float64)}
    columns |= {f"baseline_{name}": (values - label) ** 2 for name, values in baselines.items()}
    return columns | {f"bin{number}": np.where(place == number, error, 0.0) for number in range(BINS)}


def _statistics(s: Mapping[str, Any]) -> dict[str, Any]:
    """Figures from sums; all sums of one shape, a number or an array over resamples."""
    n = s["n"]

    def covariance(p: str, q: str) -> Any:
        value = s[p + q] - s[p] * s[q] / n
        # A resample of equal values: the rest is rounding.
        return np.where(value > 1e-12 * s[p + q], value, np.nan) if p == q else value

    with np.errstate(divide="ignore", invalid="ignore"):
        xx, yy, zz = covariance("x", "x"), covariance("y", "y"), covariance("z", "z")
        xy, xz, yz = (covariance(p, q) / np.sqrt(u * v) for p, q, u, v in
                      (("x", "y", xx, yy), ("x", "z", xx, zz), ("y", "z", yy, zz)))  # fmt: skip
        by_chance = s["aa"] + s["bb"] - 2 * s["a"] * s["b"] / n
        kappa = 1 - (s["aa"] + s["bb"] - 2 * s["ab"]) / np.where(by_chance > 0, by_chance, np.nan)
        unexplained = (1 - xy**2) * (1 - yz**2)
        return {
            "pearson": xy,
            "mae": s["absolute"] / n,
            "mse": s["square"] / n,
            "kappa": kappa,
            "accuracy": s["same"] / n,
            "bias": s["error"] / n,
            "slope": covariance("x", "y") / xx,
            "spread": np.sqrt(xx / yy),
            "ece": sum(np.abs(s[f"bin{number}"]) for number in range(BINS)) / n,
            **{
                f"skill_{name}": 1 - s["square"] / np.where(s[f"baseline_{name}"] > 0, s[f"baseline_{name}"], np.nan)
                for name in ("mean", "length")
            },
            "length_predicted": xz,
            "length_label": yz,
            "length_partial": (xz - xy * yz) / np.sqrt(np.where(unexplained > 1e-12, unexplained, np.nan)),
        }


def _draws(groups: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn, `[<= 64, groups]` at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _BATCH):
        rows = min(_BATCH, resamples - start)
        yield np.stack(
            [np.bincount(random.integers(0, groups, groups), minlength=groups) for _ in range(rows)]
        ).astype(np.float64)


def _intervals(
    columns: Mapping[str, Floats], predicted: Floats, label: Floats, group: np.ndarray, seed: int, resamples: int
) -> dict[str, list[float]]:
    place = np.unique(group, return_inverse=True)[1].reshape(-1)
    sums = np.stack([np.bincount(place, weights=column) for column in columns.values()], axis=1)  # [groups, columns]
    ranks = _WeightedRanks(predicted, label)
    totals, spearman = [], []
    for counts in _draws(len(sums), resamples, seed):
        totals.append(counts @ sums)
        spearman += [ranks.correlation(weights) for weights in counts[:, place]]
    drawn = _statistics(dict(zip(columns, np.concatenate(totals).T)))
    drawn["spearman"] = np.array(spearman)
    del drawn["ece"]  # resampling adds noise to each bin, so the interval would miss the figure
    return {name: _percentiles(values) for name, values in drawn.items()}


def _percentiles(values: Floats) -> list[float]:
    there = values[~np.isnan(values)]
    if not len(there):
        return [float("nan")] * 2
    tail = (1 - _CONFIDENCE) / 2
    return [float(value) for value in np.quantile(there, [tail, 1 - tail])]


class _WeightedRanks:
    """Spearman's correlation of two columns `[n]` whose rows count as often as their weights say."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.places = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in (x, y)]

    def correlation(self, weights: Floats) -> float:
        total = weights.sum()
        ranks = []
        for place in self.places:
            count = np.bincount(place, weights=weights)
            middle = (np.cumsum(count) - count / 2)[place]
            ranks.append(middle - total / 2)  # the weighted mean of mid-ranks
        x, y = ranks
        spread = (weights @ (x * x)) * (weights @ (y * y))
        return float(weights @ (x * y) / np.sqrt(spread)) if spread > 0 else float("nan")
