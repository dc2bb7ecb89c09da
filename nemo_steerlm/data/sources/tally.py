"""Counts that a source keeps while it reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from nemo_steerlm.agreement import RaterAgreement


@dataclass
class Tally:
    """What was read, and what was dropped and why; both go into ``report.json``.

    Attributes:
        read: Number of things found, by kind.
        dropped: Number of things left out, by reason.
        other_languages: What was left out for its language, by that language.
        raters: Where the data holds the ratings of each person, how well they agree, by what they rated.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    other_languages: Counter[str] = field(default_factory=Counter)
    raters: defaultdict[str, RaterAgreement] = field(default_factory=lambda: defaultdict(RaterAgreement))
