"""A regressor against human labels: figures for each dataset and attribute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.calibration import apply_curve, fit_curve, present
from nemo_steerlm.evaluate.grouped import by_the_other_folds, figures, folds
from nemo_steerlm.evaluate.reports import DatasetReport
from nemo_steerlm.evaluate.samples import Samples

ALL = "all"  # the name of all datasets together
SHOWN = ("pearson", "spearman", "mse", "mae", "kappa", "accuracy")


def measure(
    samples: Samples, schema: AttributeSchema, *, corrected: Floats | None = None, seed: int = 0, resamples: int = 1000
) -> dict[str, DatasetReport]:
    """Figures of all datasets together (where there are several) and of each.

    Args:
        samples: raw predictions and labels.
        schema: the K attributes.
        corrected: predictions `[n, K]` after a cross-fitted or stored calibration.
        seed, resamples: of the intervals.

    Returns:
        {DATASET: {n, groups, attributes: {NAME: `grouped.figures`, and with `corrected` its figures under
        "corrected"}}}; an attribute without any pair of prediction and label is left out.
    """
    names = sorted(set(samples.dataset.tolist()))
    parts = {name: samples.dataset == name for name in names}
    if len(names) > 1:
        parts = {ALL: np.ones(len(samples), bool), **parts}
    return {
        name: _dataset(samples.where(rows), schema, None if corrected is None else corrected[rows], seed, resamples)
        for name, rows in parts.items()
    }


def _dataset(
    samples: Samples, schema: AttributeSchema, corrected: Floats | None, seed: int, resamples: int
) -> DatasetReport:
    fold, attributes = folds(samples.group), dict[str, Any]()
    for k, attribute in enumerate(schema):
        x, y = samples.predicted[:, k], samples.label[:, k]
        both = ~np.isnan(x + y)
        if not both.any():
            continue
        columns = (x[both], y[both], samples.length[both], samples.group[both], fold[both])
        one = figures(*columns, attribute, seed=seed, resamples=resamples)
        if corrected is not None:
            other = figures(corrected[both, k], *columns[1:], attribute, seed=seed, resamples=0)
            one["corrected"] = {key: other[key] for key in (*SHOWN, "n", "bias", "slope", "spread", "ece", "bins")}
        attributes[attribute.name] = one
    return {"n": len(samples), "groups": len(np.unique(samples.group)), "attributes": attributes}


def cross_fitted(samples: Samples, schema: AttributeSchema, method: str, inputs: Sequence[Floats]) -> Floats:
    """Predictions `[n, K]` calibrated by curves that were fitted on the other folds; raw where none could be fitted.

    On the rows it was fitted on, a calibration looks too good; isotonic regression always does.

    Args:
        samples: raw predictions and labels.
        schema: the K attributes.
        method: a choice of `EvaluateConfig.calibrate`.
        inputs: of each attribute the input of `fit_curve`.
    """
    fold, corrected = folds(samples.group), samples.predicted.copy()
    for k, attribute in enumerate(schema):
        x, y = inputs[k], samples.label[:, k]
        both = present(x, y)

        def fit(x: Floats, y: Floats, attribute: Any = attribute) -> Callable[[Floats], Floats]:
            curve = fit_curve(method, x, y, attribute)
            return (lambda new: np.full(len(new), np.nan)) if curve is None else partial(apply_curve, curve)

        values = by_the_other_folds(fold[both], fit, x[both], y[both])
        corrected[both, k] = np.where(np.isnan(values), corrected[both, k], values)
    return corrected
