"""Ratings as datasets hold them, to labels of a schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import DataError

Label = dict[str, float]


def label_of(
    ratings: Mapping[str, Any], low: float, high: float, schema: AttributeSchema, where: str
) -> tuple[Label | None, int | None]:
    """Return the label of those ratings that the schema has, on the schema's scale, and how many people gave it.

    Args:
        ratings: Attribute to a number, a number as text, a list with one for each person, or None, "", "N/A" where
            it is missing.
        low, high: The dataset's own scale; it is stretched onto each attribute's range.
        schema: What is asked for; the rest is left out.
        where: Leads error messages.

    Raises:
        DataError: Not a number, or outside the scale.
    """
    label, people = {}, None
    for attribute in schema:
        given = [number for number in map(_number, _each(ratings.get(attribute.name))) if number is not None]
        if not given:
            continue
        for number in given:
            if not low <= number <= high:
                raise DataError(f"{where}: '{attribute.name}' is {number}, expected {low:g} to {high:g}")
        share = (sum(given) / len(given) - low) / (high - low)
        label[attribute.name] = attribute.low + share * (attribute.high - attribute.low)
        if isinstance(ratings[attribute.name], list):
            people = len(given) if people is None else min(people, len(given))
    return label or None, people


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> Any:
    """A number, None where it is missing, and anything else as it is (no comparison with a number holds for NaN)."""
    if value is None or isinstance(value, str) and value.strip() in ("", "N/A"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
