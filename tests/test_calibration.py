"""The stored calibration against scikit-learn and scipy, and what a damaged file says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.calibration import FILE, Calibration, apply_curve, fit, fit_curve
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.models.heads import DistributionHead, make_head

SCHEMA = AttributeSchema.load({"quality": {"low": 0, "high": 4}, "humor": {"low": 0, "high": 4}})


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Predictions shrunk to their mean; humor has eight labels only."""
    random = np.random.default_rng(0)
    label = random.integers(0, 5, (200, 2)).astype(float)
    predicted = 1.4 + 0.3 * label + random.normal(0, 0.3, label.shape)
    label[random.random(200) < 0.2, 0] = np.nan
    label[8:, 1] = np.nan
    return predicted, label


@pytest.mark.parametrize("method", ["isotonic", "linear"])
def test_a_correction_is_the_librarys_before_and_after_the_file(method: str, tmp_path: Path) -> None:
    predicted, label = rows()
    there = ~np.isnan(label[:, 0])
    x, y = predicted[there, 0], label[there, 0]
    fitted = fit(method, list(predicted.T), label, SCHEMA, {"rows": 200})
    assert list(fitted.attributes) == ["quality"]  # too few labels of humor
    fitted.write(tmp_path)
    read = Calibration.read(tmp_path, SCHEMA)
    assert read == fitted and read is not None
    new = np.array([[-5.0, 1.0], [1.5, 2.0], [2.123, np.nan], [9.0, 0.5], [np.nan, 1.0]], np.float32)
    corrected = read.apply(new, SCHEMA)
    if method == "isotonic":
        expected = IsotonicRegression(y_min=0, y_max=4, out_of_bounds="clip").fit(x, y).predict(new[:4, 0])
    else:
        line = stats.linregress(x, y)
        expected = line.slope * new[:4, 0] + line.intercept
    assert corrected[:4, 0] == pytest.approx(expected, abs=1e-5) and math.isnan(corrected[4, 0])
    assert corrected.dtype == np.float32 and np.array_equal(corrected[:, 1], new[:, 1], equal_nan=True)


def test_constant_predictions_are_left_alone() -> None:
    predicted, label = rows()
    predicted[:, 0] = 2.0
    assert fit("linear", list(predicted.T), label, SCHEMA).attributes == {}


def test_a_temperature_makes_the_distributions_right_again(tmp_path: Path) -> None:
    """Labels drawn from a distribution, predicted with three times its logits: the temperature is 3."""
    import torch

    random = np.random.default_rng(0)
    schema = AttributeSchema.load({"quality": {"low": 1, "high": 3}, "humor": {"low": 0, "high": 4}})
    logits = random.normal(size=(5000, 3))
    right = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = np.full((5000, 2), np.nan)
    label[:, 0] = 1 + (random.random(5000)[:, None] > right.cumsum(1)).sum(1)
    label[0, 0] = np.nan
    head = make_head("distribution", schema)
    assert isinstance(head, DistributionHead)
    raw = torch.tensor(np.concatenate([3 * logits, random.normal(size=(5000, 5))], axis=1))
    inputs = np.split(head.probabilities(raw).numpy(), [3], axis=1)
    fitted = fit("temperature", inputs, label, schema)
    temperatures = fitted.temperatures(schema)
    assert list(fitted.attributes) == ["quality"] and temperatures is not None and temperatures[1] == 1.0
    temperature = fitted.attributes["quality"]["temperature"]
    assert temperature == pytest.approx(3.0, rel=0.06)

    def cross_entropy(t: float) -> float:
        shares = inputs[0][1:] ** (1 / t)
        shares /= shares.sum(1, keepdims=True)
        return float(-np.log(shares[np.arange(4999), label[1:, 0].astype(int) - 1]).mean())

    assert cross_entropy(temperature) < min(map(cross_entropy, (0.99 * temperature, 1.01 * temperature, 1.0)))
    fitted.write(tmp_path)
    assert Calibration.read(tmp_path, schema) == fitted
    plain = head.values(raw)
    calm = head.values(torch.tensor(np.concatenate([3 * logits / temperature, raw[:, 3:]], axis=1)))
    head.temperatures = fitted.temperatures(schema)
    values = head.values(raw)
    assert values[:, 0].numpy() == pytest.approx(apply_curve(fitted.attributes["quality"], inputs[0]))
    assert torch.allclose(values, calm) and torch.allclose(values[:, 1], plain[:, 1])
    assert np.abs(right @ [1, 2, 3] - values[:, 0].numpy()).max() < 0.05 < (plain - values).abs().max()


@pytest.mark.parametrize("method", ["isotonic", "linear"])
def test_a_correction_never_turns_an_order_round(method: str) -> None:
    label = np.tile(np.arange(5.0), 8)
    curve = fit_curve(method, 4 - label, label, SCHEMA["quality"])
    assert curve is not None
    assert apply_curve(curve, np.array([-1.0, 0.5, 3.9])) == pytest.approx([2.0, 2.0, 2.0])


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    assert Calibration.read(tmp_path, SCHEMA) is None
    curve = {"slope": 1.0, "intercept": 0.0}
    for content, words in (
        ("{", "damaged"),
        (json.dumps({"method": "linear"}), "damaged"),
        (json.dumps({"method": "linear", "attributes": {"quality": {"slope": 1}}}), "damaged"),
        (json.dumps({"method": "linear", "attributes": {"humour": curve}}), "corrects humour"),
        (json.dumps({"method": "temperature", "attributes": {"humor": {"temperature": 2}}}), "damaged"),
    ):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(CheckpointError, match=words):
            Calibration.read(tmp_path, SCHEMA)
