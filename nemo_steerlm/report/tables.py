"""Figures as text: one number, an interval, a duration, a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOTHING = "–"  # in place of a missing value


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """Writes a number with a true minus sign; whole numbers stay whole, None and NaN become a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, int):
        return f"{value:+d}".replace("-", "−") if sign else f"{value:d}".replace("-", "−")
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"  # not -0.000
    return text.replace("-", "−")


def interval(bounds: Sequence[Any] | None, digits: int = 3, sign: bool = False) -> str:
    """Writes [low, high] as "0.812 to 0.851"."""
    if bounds is None or all(number(bound) == NOTHING for bound in bounds):
        return NOTHING
    return " to ".join(number(bound, digits, sign) for bound in bounds)


def duration(seconds: float) -> str:
    """Writes a duration for people: "3.5 s", "4 min 05 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def text_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Lays rows out for a terminal, as lines without a closing newline.

    Args:
        rows: cells of any type: floats get three decimals, booleans yes or no, None a dash.
        headers: one title a column. Columns of numbers are set flush right, all others flush left.
    """
    assert all(len(row) == len(headers) for row in rows), "every row needs one cell a header"
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    numeric = [
        any(map(_is_number, column)) and all(value is None or _is_number(value) for value in column)
        for column in (list(zip(*rows)) or [()] * len(headers))
    ]

    def line(values: Sequence[str]) -> str:
        placed = (value.rjust(w) if right else value.ljust(w) for value, w, right in zip(values, widths, numeric))
        return "  ".join(placed).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(headers), rule, *map(line, cells)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if value is None or _is_number(value) else str(value)
