"""From the ratings of a dataset to labels of a schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError

Label = dict[str, float]


def label_of(
    ratings: Mapping[str, Any], low: float, high: float, schema: AttributeSchema, tally: Tally, where: str
) -> tuple[Label | None, int | None]:
    """Return the label of those ratings that the schema has, on the schema's scale, and how many annotators gave it.

    Args:
        ratings: Attribute to a number, a number as text, a list with one for each annotator, or None, "", "N/A" where
            it is missing.
        low, high: The dataset's own scale; it is stretched onto each attribute's range.
        schema: The attributes to keep; others are left out.
        tally: Counts how well the annotators of a list agree.
        where: Begins error messages.

    Raises:
        DataError: Not a number, or outside the scale.
    """
    label, annotators = {}, None
    for attribute in schema:
        found = [value for value in _each(ratings.get(attribute.name)) if not _missing(value)]
        if not found:
            continue
        given = [_number(value) for value in found]
        for value, number in zip(found, given):
            if not low <= number <= high:
                raise DataError(f"{where}: '{attribute.name}' is {value!r:.60}, expected {low:g} to {high:g}")
        share = (sum(given) / len(given) - low) / (high - low)
        label[attribute.name] = attribute.low + share * (attribute.high - attribute.low)
        if isinstance(ratings[attribute.name], list):
            tally.raters[attribute.name].add(given)
            annotators = len(given) if annotators is None else min(annotators, len(given))
    return label or None, annotators


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _missing(value: Any) -> bool:
    return value is None or isinstance(value, str) and value.strip() in ("", "N/A")


def _number(value: Any) -> float:
    """A number, NaN for anything else: no comparison holds for that."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
