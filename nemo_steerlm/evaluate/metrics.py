"""Bootstrap intervals, paired differences, and figures as plain JSON.

NaN stands for missing values and undefined figures (the mean of nothing); `json_ready` turns it into null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nemo_steerlm.agreement import Floats
from nemo_steerlm.evaluate.reports import Change


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
) -> Change:
    """Mean change of a score between two systems that answered the same prompts.

    Responses are averaged for each prompt first, and prompts are resampled: two responses to one prompt are not
    independent.

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


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _mean_by(values: Floats, keys: Sequence[Hashable]) -> dict[Hashable, float]:
    assert len(values) == len(keys), (len(values), len(keys))
    groups: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, values):
        if not math.isnan(value):
            groups.setdefault(key, []).append(float(value))
    return {key: math.fsum(group) / len(group) for key, group in groups.items()}
