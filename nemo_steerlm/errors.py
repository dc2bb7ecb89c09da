"""Errors that are the user's to fix; their message is shown as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteerLMError(ValueError):
    """Input, config or checkpoint that cannot be used; the message says what, where, and what to do."""


class ConfigError(SteerLMError):
    """A setting is unknown, contradicts another one, or names something that does not exist."""


class DataError(SteerLMError):
    """A data file is malformed, empty, or holds values outside the attribute schema."""


class CheckpointError(SteerLMError):
    """A model folder or checkpoint is missing, incomplete, or does not fit."""


class Stopped(Exception):
    """A signal has ended a training, which can be resumed: it finished its step and saved its state.

    Args:
        number: the signal's; a command exits with 128 + it.
        message: the step, and how to resume.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate nearest to ``name``, None if all are less similar than ``cutoff`` (1: equal but case)."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'X'?"`` for the candidate nearest to ``name``, or an empty string.

    Args:
        name: What the user wrote.
        candidates: The names that exist.
    """
    found = nearest(name, candidates)
    return "" if found is None else f"; did you mean '{found}'?"
