"""Baselines that need no model: answer length and TF-IDF. And logistic regression on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_steerlm.data.benchmarks import Comparison
from nemo_steerlm.evaluate.preference import Floats, Scores

FOLDS = 5


def longer(comparisons: Sequence[Comparison]) -> Scores:
    """The length of each answer in characters."""
    return _split([float(len(text)) for text in _texts(comparisons)], comparisons)


def tfidf(
    comparisons: Sequence[Comparison], train: Sequence[Comparison] | None = None, seed: int = 0
) -> Scores | None:
    """TF-IDF of each answer's words and pairs of words, weighed by logistic regression on pairs.

    Args:
        comparisons: what to score.
        train: held-out comparisons to fit on; None = cross-fit, each fifth of the prompts scored by a fit on the rest.
        seed: of the folds.

    Returns:
        Scores in the order of `comparisons`, None where there is too little to fit on.
    """
    if train is not None:
        model = _fit(train)
        return _split(model(_texts(comparisons)), comparisons)
    units = {unit: i for i, unit in enumerate(dict.fromkeys(row.unit for row in comparisons))}
    if len(units) < FOLDS:
        return None
    fold = np.random.default_rng(seed).permutation(len(units)) % FOLDS
    scores: list[tuple[Floats, Floats]] = [(np.zeros(0), np.zeros(0))] * len(comparisons)
    for number in range(FOLDS):
        inside = [fold[units[row.unit]] == number for row in comparisons]
        held = [i for i, held_out in enumerate(inside) if held_out]
        model = _fit([row for row, held_out in zip(comparisons, inside) if not held_out])
        rows = [comparisons[i] for i in held]
        for i, pair in zip(held, _split(model(_texts(rows)), rows)):
            scores[i] = pair
    return scores


def fit_pairs(features: Any, comparisons: Sequence[Comparison]) -> NDArray[np.float64]:
    """Weights of features such that chosen answers score above rejected ones (logistic loss, L2 penalty, C = 1).

    Args:
        features: `[answers, F]`, dense or sparse: of each comparison its chosen answers, then its rejected ones.
        comparisons: each counts once, however many pairs it has.

    Returns:
        Weights `[F]`.
    """
    from sklearn.linear_model import LogisticRegression

    chosen: list[int] = []
    rejected: list[int] = []
    shares: list[float] = []
    start = 0
    for row in comparisons:
        first, others = range(start, start + len(row.chosen)), len(row.rejected)
        for i in first:
            chosen += [i] * others
            rejected += range(first.stop, first.stop + others)
        shares += [1 / (len(first) * others)] * (len(first) * others)
        start = first.stop + others
    pairs = 2 * [share / 2 for share in shares]
    features = features[chosen + rejected] - features[rejected + chosen]  # both ways round: fitting needs two classes
    sign = np.repeat([1.0, -1.0], len(chosen))
    model = LogisticRegression(fit_intercept=False, max_iter=1000, tol=1e-6)
    return model.fit(features, sign, sample_weight=pairs).coef_[0]


def _fit(train: Sequence[Comparison]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    weights = fit_pairs(words.fit_transform(_texts(train)), train)
    return lambda texts: words.transform(texts) @ weights


def _texts(comparisons: Sequence[Comparison]) -> list[str]:
    return [one.turns[-1].text for row in comparisons for one in row.answers]


def _split(values: Any, comparisons: Sequence[Comparison]) -> list[tuple[Floats, Floats]]:
    """Values of all answers, one after another, as scores of each comparison."""
    ends = np.cumsum([[len(row.chosen), len(row.rejected)] for row in comparisons])
    parts = np.split(np.asarray(values, np.float64), ends[:-1])
    return list(zip(parts[::2], parts[1::2], strict=True))
