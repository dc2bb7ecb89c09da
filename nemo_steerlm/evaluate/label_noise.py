"""Predicted against human labels by dataset, language and number of annotators, with the ceiling set by label noise.

The SteerLM paper (arXiv 2310.05344, section 3.2) argues that a regressor denoises the annotators' labels, but does not
report how far predicted and human labels agree. By classical test theory a correlation with noisy labels is at most
the root of their reliability, so r squared on held-out rows is a lower bound of the reliability. If rows name the
number m of annotators that a label is the mean of, the expected squared residual is (error of the prediction) +
(variance of one annotator) / m: its slope on 1/m is the noise of one annotator, and gives the ceiling itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats, levels
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.calibration import least_squares
from nemo_steerlm.evaluate.grouped import figures, folds
from nemo_steerlm.evaluate.metrics import bootstrap_interval
from nemo_steerlm.evaluate.samples import Samples

LEAST_ROWS = 30  # a language or number of annotators with fewer rows is not listed


def measure(samples: Samples, schema: AttributeSchema, *, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """`part_figures` by kind of part: {"dataset" | "language" | "annotators": {PART: {NAME: figures}}}."""
    annotators = np.array(["" if np.isnan(count) else f"{count:g}" for count in samples.annotators])
    columns = {"dataset": samples.dataset, "language": samples.language, "annotators": annotators}
    result: dict[str, Any] = {}
    for kind, column in columns.items():
        result[kind] = {}
        names, counts = np.unique(column[column != ""], return_counts=True)
        for name in names[np.argsort(-counts, kind="stable")].tolist():
            part = samples.where(column == name)
            if kind == "dataset" or len(part) >= LEAST_ROWS:
                result[kind][name] = _part(part, schema, seed, resamples)
    return result


def _part(samples: Samples, schema: AttributeSchema, seed: int, resamples: int) -> dict[str, Any]:
    result, fold = {}, folds(samples.group)
    for k, attribute in enumerate(schema):
        both = ~np.isnan(samples.predicted[:, k] + samples.label[:, k])
        if both.any():
            result[attribute.name] = part_figures(
                samples.where(both), k, attribute, fold[both], seed=seed, resamples=resamples
            )
    return result


def part_figures(
    samples: Samples, k: int, attribute: Attribute, fold: np.ndarray, *, seed: int, resamples: int
) -> dict[str, Any]:
    """One attribute of one part, whose rows all have a prediction and a label.

    Returns:
        n, groups, pearson, spearman, mae, kappa, bias with `interval`; higher, lower (share of rows whose prediction
        rounds above, below the label); entropy (bits of the rounded labels; log2 of the levels is the most); ties
        (share of labels at an exact half, which rounding decides); reliability_least (r squared); and where the number
        of annotators varies noise (standard deviation of one annotator's label, with interval) and ceiling
        (correlation that a perfect predictor would reach, NaN where residuals do not shrink with their number).
    """
    x, y = samples.predicted[:, k], samples.label[:, k]
    one = figures(x, y, samples.length, samples.group, fold, attribute, seed=seed, resamples=resamples)
    keys = ("n", "groups", "pearson", "spearman", "mae", "kappa", "bias")
    result: dict[str, Any] = {key: one[key] for key in keys}
    if "interval" in one:
        result["interval"] = {key: one["interval"][key] for key in keys if key in one["interval"]}
    x_level, y_level = levels(x, attribute), levels(y, attribute)
    share = np.unique(y_level, return_counts=True)[1] / len(y)
    result |= {
        "higher": float((x_level > y_level).mean()),
        "lower": float((x_level < y_level).mean()),
        "entropy": float(-(share * np.log2(share)).sum()) + 0.0,
        "ties": float((np.abs(y % 1 - 0.5) < 1e-9).mean()),
        "reliability_least": one["pearson"] ** 2,
    }
    return result | _noise(x, y, samples.annotators, samples.group, seed, resamples)


def _noise(x: Floats, y: Floats, annotators: Floats, group: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    """Noise of one annotator and the ceiling, from the slope of squared residuals on 1/m; {} where m is constant."""
    known = ~np.isnan(annotators)
    counts = np.unique(annotators[known], return_counts=True)[1]
    if (counts >= LEAST_ROWS).sum() < 2:
        return {}
    x, y, share, group = x[known], y[known], 1 / annotators[known], group[known]
    slope, intercept = least_squares(x, y)
    residual = (y - slope * x - intercept) ** 2
    variance, _ = least_squares(share, residual)
    noise = float(np.sqrt(max(variance, 0.0)))
    reliability = 1 - noise**2 * share.mean() / y.var() if variance > 0 and y.var() > 0 else np.nan
    result: dict[str, Any] = {"noise": noise, "ceiling": float(np.sqrt(np.clip(reliability, 0, 1)))}
    if resamples:
        place = np.unique(group, return_inverse=True)[1].reshape(-1)
        moments = (np.ones(len(x)), share, share**2, residual, share * residual)
        sums = [np.bincount(place, weights=column) for column in moments]

        def slope_of(*columns: Floats) -> float:
            n, u, uu, w, uw = (column.sum() for column in columns)
            spread = uu - u * u / n
            return float(np.sqrt(max(0.0, (uw - u * w / n) / spread))) if spread > 1e-12 else float("nan")

        result["noise_interval"] = bootstrap_interval(*sums, seed=seed, statistic=slope_of, resamples=resamples)
    return result
