"""Counts that a source keeps while it reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from nemo_steerlm.agreement import RaterAgreement
from nemo_steerlm.conversation import Turn


@dataclass
class Tally:
    """What was read, and what was dropped and why; both go into ``report.json``.

    Attributes:
        read: Number of things found, by kind.
        dropped: Number of things left out, by reason.
        unused: Keys of turns that no prompt has a place for; the rows keep them.
        other_languages: What was left out for its language, by that language.
        raters: Where the data holds the ratings of each annotator, how well they agree, by what they rated.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    other_languages: Counter[str] = field(default_factory=Counter)
    raters: defaultdict[str, RaterAgreement] = field(default_factory=lambda: defaultdict(RaterAgreement))

    def count_unused(self, turns: Iterable[Turn]) -> None:
        """Count the keys that no prompt has a place for."""
        for turn in turns:
            if turn.extra:
                self.unused.update(turn.extra.keys())
