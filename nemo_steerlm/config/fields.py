"""What every setting is declared with: a dataclass field that carries its help text, range and example."""

from __future__ import annotations

import dataclasses
from typing import Any

MOST_SEED = 2**32 - 1  # 32 bits, which every generator takes


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    example: str = "",
) -> Any:
    """A dataclass field with what `--help` shows and `compose` checks.

    Args:
        default: the default; a class or function makes a new one each time; MISSING = the user must give it.
        text: one line of help, with the unit.
        choices: the strings allowed.
        least: smallest number allowed.
        most: largest number allowed.
        below: number that is too large already.
        example: a value to show where the user left a mandatory one out.
    """
    ranges = {"least": least, "most": most, "below": below}
    metadata = {"help": text, "choices": choices, **ranges, "example": example}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
