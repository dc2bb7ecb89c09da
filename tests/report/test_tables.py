"""Numbers and tables as text."""

from __future__ import annotations

import math

import pytest

from nemo_steerlm.report.tables import interval, number, text_table


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (0.81649, 3, False, "0.816"),
        (-0.0651, 2, True, "−0.07"),
        (0.5, 1, True, "+0.5"),
        (-0.0004, 3, False, "0.000"),
        (-0.0004, 3, True, "0.000"),
        (120, 3, False, "120"),
        (-3, 3, False, "−3"),
        (None, 3, False, "–"),
        (math.nan, 3, True, "–"),
        (-math.inf, 3, False, "–"),
    ],
)
def test_number(value: float | None, digits: int, sign: bool, text: str) -> None:
    assert number(value, digits, sign) == text


def test_interval() -> None:
    assert interval([-0.01, 0.2], 2, sign=True) == "−0.01 to +0.20"
    assert interval(None) == interval([None, math.nan]) == "–"


def test_table_sets_numbers_right_and_words_left() -> None:
    rows: list[list[object]] = [["quality", 0.9144, True, 12], ["humor", None, False, 5000]]
    assert text_table(rows, ["attribute", "pearson", "rising", "n"]).split("\n") == [
        "attribute  pearson  rising     n",
        "─────────  ───────  ──────  ────",
        "quality      0.914  yes       12",
        "humor            –  no      5000",
    ]


def test_table_without_rows_and_with_uneven_ones() -> None:
    assert text_table([], ["a", "bc"]) == "a  bc\n─  ──"
    with pytest.raises(AssertionError, match="one cell a header"):
        text_table([[1]], ["a", "b"])
