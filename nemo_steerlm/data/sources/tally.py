"""Counts that a source keeps while it reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from nemo_steerlm.agreement import RaterAgreement
from nemo_steerlm.conversation import Turn


@dataclass
class Tally:
    """Counts of rows read and dropped; both go into ``report.json``.

    Attributes:
        read: Number of items found, by kind.
        dropped: Number of items left out, by reason.
        unused: Keys of turns that prompts do not use; the rows keep them.
        other_languages: Number of items left out for their language, by language.
        raters: Agreement of annotators by attribute, where the data holds the ratings of each.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    other_languages: Counter[str] = field(default_factory=Counter)
    raters: defaultdict[str, RaterAgreement] = field(default_factory=lambda: defaultdict(RaterAgreement))

    def count_unused(self, turns: Iterable[Turn]) -> None:
        """Count the keys that prompts do not use."""
        for turn in turns:
            if turn.extra:
                self.unused.update(turn.extra.keys())
