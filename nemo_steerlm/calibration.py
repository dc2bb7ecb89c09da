"""Calibration of predictions: fitted on labelled rows, stored with the regressor, applied to all its predictions.

`calibration.json` in the model folder holds plain numbers, so that any program can apply it:

    {"method": "isotonic", "attributes": {NAME: {"x": [...], "y": [...]}}, ...}       value = interp(raw, x, y)
    {"method": "linear", "attributes": {NAME: {"slope": s, "intercept": i}}, ...}     value = s * raw + i
    {"method": "temperature", "attributes": {NAME: {"temperature": t, "levels": [...]}}, ...}

The first two correct values. A temperature corrects the distribution of a head over levels, to P ** (1 / t) divided
by its sum, and the value is the mean of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.integrity import listing

FILE = "calibration.json"
LEAST_ROWS = 10  # an attribute with fewer labels is not calibrated
_TINY = 1e-30  # a probability that underflowed


@dataclass(frozen=True)
class Calibration:
    """One curve per attribute; an attribute without one is not calibrated.

    Attributes:
        method: a choice of `EvaluateConfig.calibrate`.
        attributes: what `fit_curve` returned, by name.
        about: origin: rows, inputs with sha256 (JSON values).
    """

    method: str
    attributes: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, values: np.ndarray, schema: AttributeSchema) -> np.ndarray:
        """Correct values `[n, K]` in schema order; NaN stays NaN, the number format stays too.

        They are means of corrected distributions already where the method is a temperature: see `temperatures`.
        """
        if self.method == "temperature":
            return values
        corrected = values.copy()
        for k, name in enumerate(schema.names):
            if name in self.attributes:
                corrected[:, k] = apply_curve(self.attributes[name], values[:, k])
        return corrected

    def temperatures(self, schema: AttributeSchema) -> list[float] | None:
        """The temperature of each attribute, 1 where none was fitted; None where the method is another."""
        if self.method != "temperature":
            return None
        return [self.attributes.get(name, {"temperature": 1.0})["temperature"] for name in schema.names]

    def write(self, folder: Path | str) -> None:
        """Write `calibration.json` into a model folder, atomically."""
        content = {"method": self.method, "attributes": self.attributes, **self.about}
        with listing(Path(folder), FILE), atomic_writer(Path(folder) / FILE) as file:
            json.dump(content, file, indent=2)
            file.write("\n")

    @classmethod
    def read(cls, folder: Path | str, schema: AttributeSchema) -> Calibration | None:
        """The calibration of a model folder, None where it has none.

        Raises:
            CheckpointError: the file is damaged, or for other attributes.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = cls(content.pop("method"), content.pop("attributes"), content)
            for curve in found.attributes.values():
                apply_curve(curve, np.ones((1, len(curve["levels"]))) if "levels" in curve else np.zeros(1))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged calibration: {error}; remove it or fit it again") from error
        unknown = [name for name in found.attributes if name not in schema]
        if unknown:
            raise CheckpointError(
                f"{path}: corrects {', '.join(unknown)}, which this model does not predict "
                f"({', '.join(schema.names)}); remove it or fit it again"
            )
        return found


def fit(
    method: str,
    predicted: Sequence[Floats],
    label: Floats,
    schema: AttributeSchema,
    about: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit one curve for each attribute that has enough rows with both a prediction and a label.

    Args:
        method: a choice of `EvaluateConfig.calibrate`.
        predicted: of each attribute raw values `[n]`, or for a temperature probabilities `[n, levels]`; NaN = missing.
        label: `[n, K]`, NaN = missing.
        schema: the K attributes.
        about: goes into the file.
    """
    curves = {}
    for k, attribute in enumerate(schema):
        both = present(predicted[k], label[:, k])
        curve = fit_curve(method, predicted[k][both], label[both, k], attribute)
        if curve is not None:
            curves[attribute.name] = curve
    return Calibration(method, curves, about or {})


def present(x: Floats, y: Floats) -> np.ndarray:
    """Which rows of `x` `[n]` or `[n, levels]` and of `y` `[n]` hold numbers."""
    return ~np.isnan(x.reshape(len(y), -1).sum(1) + y)


def fit_curve(method: str, x: Floats, y: Floats, attribute: Attribute) -> dict[str, Any] | None:
    """The best curve from predictions to labels `[n]`; None with too few rows or a constant `x`.

    For values `x` `[n]` the least-squares curve that never falls: a calibration may not reverse an order, so
    predictions with a negative slope become the mean label. Isotonic: within the attribute's range, constant outside
    of the fitted values (`sklearn.isotonic.IsotonicRegression`). Temperature: minimises the cross-entropy between
    labels and the distributions `x` `[n, levels]` (Guo et al., 2017, arXiv 1706.04599, section 4.2).
    """
    if len(x) < LEAST_ROWS or np.ptp(x, axis=0).max() == 0:
        return None
    if method == "temperature":
        return _fit_temperature(x, y, np.arange(attribute.low, attribute.high + 1))
    if method == "linear":
        slope, intercept = least_squares(x, y)
        return {"slope": slope, "intercept": intercept} if slope > 0 else {"slope": 0.0, "intercept": float(y.mean())}
    assert method == "isotonic", method
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=attribute.low, y_max=attribute.high, out_of_bounds="clip").fit(x, y)
    return {"x": model.X_thresholds_.tolist(), "y": model.y_thresholds_.tolist()}


def _fit_temperature(probabilities: Floats, y: Floats, levels: np.ndarray) -> dict[str, Any]:
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logs = np.log(np.maximum(probabilities, _TINY))
    target = np.clip(1 - np.abs(y[:, None] - levels), 0, None)  # as `LevelHead.target`

    def loss(log_temperature: float) -> float:
        return float(-(target * log_softmax(logs / np.exp(log_temperature), axis=1)).sum(1).mean())

    found = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return {"temperature": float(np.exp(found.x)), "levels": levels.tolist()}


def apply_curve(curve: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """Values `[n]` after one attribute's curve, from values `[n]` or for a temperature from `[n, levels]`."""
    if "levels" in curve:
        from scipy.special import softmax

        return softmax(np.log(np.maximum(values, _TINY)) / curve["temperature"], axis=1) @ np.array(curve["levels"])
    if "x" in curve:
        return np.interp(values, curve["x"], curve["y"])
    return curve["slope"] * values + curve["intercept"]


def least_squares(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept of the line through `[n]` points; a flat one at the mean where `x` is constant."""
    middle_x, middle_y = x.mean(), y.mean()
    spread = ((x - middle_x) ** 2).sum()
    slope = float(((x - middle_x) * (y - middle_y)).sum() / spread) if np.ptp(x) > 0 else 0.0
    return slope, float(middle_y - slope * middle_x)
