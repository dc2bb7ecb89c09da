"""The figures that annotation streams for its report."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_steerlm.stages.annotate import _Moments


def test_streamed_moments_are_numpys_and_a_constant_correlates_with_nothing() -> None:
    random = np.random.default_rng(0)
    x = 2 + 1e-3 * random.normal(size=5000)
    y = x + 1e-3 * random.normal(size=5000)
    moments, constant = _Moments(), _Moments()
    for one, two in zip(x, y):
        moments.add(one, two)
        constant.add(2.0001, two)
    assert moments.pearson() == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert (moments.x, moments.xx / moments.n) == pytest.approx((x.mean(), x.var()), rel=1e-9)
    assert constant.pearson() is None and constant.xx == 0.0 and constant.x == 2.0001
    assert _Moments().pearson() is None
