"""Counts that a source keeps while it reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What was read, and what was dropped and why; both go into ``report.json``.

    Attributes:
        read: Number of things found, by kind.
        dropped: Number of things left out, by reason.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
