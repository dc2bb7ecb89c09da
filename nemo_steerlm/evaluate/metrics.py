"""Agreement of two sets of attribute values, and bootstrap intervals.

Arrays are `[n, K]` in schema order with NaN for what is missing; all sums run in float64. A number that does not exist
(the correlation with a constant, the mean of nothing) is NaN; `json_ready` turns it into null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_steerlm.attributes import AttributeSchema

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
    result = {}
    for k, attribute in enumerate(schema):
        both = ~(np.isnan(predicted_NK[:, k]) | np.isnan(target_NK[:, k]))
        x, y = predicted_NK[both, k], target_NK[both, k]
        x_level = np.clip(np.rint(x), attribute.low, attribute.high)
        y_level = np.clip(np.rint(y), attribute.low, attribute.high)
        result[attribute.name] = {
            "pearson": pearson(x, y),
            "spearman": spearman(x, y),
            "mae": _mean(np.abs(x - y)),
            "mse": _mean((x - y) ** 2),
            "kappa": quadratic_kappa(x_level, y_level),
            "accuracy": _mean((x_level == y_level).astype(np.float64)),
            "n": int(both.sum()),
        }
    return result


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


def bootstrap_interval(
    *arrays: ArrayLike,
    seed: int,
    statistic: Callable[..., ArrayLike] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> list[Any]:
    """Percentile bootstrap interval of a statistic.

    Args:
        arrays: values whose first axis are the independent units (prompts); all are resampled together.
        seed: of the resampling; the same seed draws the same units for arrays of the same length.
        statistic: called with the resampled arrays, returns a number or an array of them; the mean of the first array
            when left out. Resamples in which it is NaN do not count.
        confidence: mass inside the interval.
        resamples: number of draws.

    Returns:
        [low, high] as floats, or as arrays of the statistic's shape. NaN where nothing could be computed.
    """
    columns = [np.asarray(array, np.float64) for array in arrays]
    count = len(columns[0])
    assert all(len(column) == count for column in columns), [len(column) for column in columns]
    measure = statistic or (lambda values, *_: values.mean(axis=0))
    if not count:
        return [math.nan, math.nan]
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        units = random.integers(0, count, count)
        draws.append(measure(*(column[units] for column in columns)))
    drawn = np.asarray(draws, np.float64)
    empty = np.isnan(drawn).all(axis=0)
    filled = np.where(empty, 0.0, drawn)  # nanquantile warns about columns without a number
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.where(empty, np.nan, np.nanquantile(filled, tails, axis=0))
    return [low, high] if drawn.ndim > 1 else [float(low), float(high)]


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    *,
    seed: int,
    prompts_before: Sequence[Hashable] | None = None,
    prompts_after: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Mean change of a score between two systems that answered the same prompts.

    Responses are averaged for each prompt first, and prompts are what is resampled: two responses to one prompt are
    not independent.

    Args:
        before: scores `[n]` of the first system, NaN = missing.
        after: scores `[m]` of the second.
        seed: of the resampling.
        prompts_before: the prompt of each score, any hashable; row i is prompt i when left out.
        prompts_after: the same for `after`; equal to `prompts_before` when left out.
        confidence: mass inside the interval.
        resamples: number of draws.

    Returns:
        gain (mean of after - before over the prompts both answered), interval [low, high], n (prompts).
    """
    scores_before, scores_after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if prompts_before is None:
        prompts_before = range(len(scores_before))
    first = _mean_by(scores_before, prompts_before)
    second = _mean_by(scores_after, prompts_before if prompts_after is None else prompts_after)
    change = np.array([second[prompt] - first[prompt] for prompt in first if prompt in second], np.float64)
    interval = bootstrap_interval(change, seed=seed, confidence=confidence, resamples=resamples)
    return {"gain": _mean(change), "interval": interval, "n": len(change)}


def json_ready(value: Any) -> Any:
    """Copies nested data into plain JSON types: arrays become lists, NaN and infinities null, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        return json_ready(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _ranks(values: ArrayLike) -> Floats:
    # scipy.stats.rankdata gives the same numbers; its checks take longer than the ranks, 1000 times over
    _, place, count = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _mean_by(values: Floats, keys: Sequence[Hashable]) -> dict[Hashable, float]:
    assert len(values) == len(keys), (len(values), len(keys))
    groups: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, values):
        if not math.isnan(value):
            groups.setdefault(key, []).append(float(value))
    return {key: math.fsum(group) / len(group) for key, group in groups.items()}
