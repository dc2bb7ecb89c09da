"""Counts that a source keeps while it reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What was read, what was dropped and why, and how raters agree; all of it goes into ``report.json``.

    Attributes:
        read: Number of things found, by kind.
        dropped: Number of things left out, by reason.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    _rated: dict[str, list[float]] = field(default_factory=dict)

    def rated(self, name: str, ratings: Sequence[float]) -> None:
        """Count what several people gave one response; one person's rating tells nothing."""
        people = len(ratings)
        if people < 2:
            return
        total, squares = math.fsum(ratings), math.fsum(rating * rating for rating in ratings)
        products = (total * total - squares) / (people - 1)  # of two different people, each counted with all others
        sums = self._rated.get(name, [0.0] * 5)
        self._rated[name] = [a + b for a, b in zip(sums, (1, people, total, squares, products), strict=True)]

    def rater_agreement(self) -> dict[str, dict[str, float | int | None]]:
        """How well people agree, for each attribute that several of them rated.

        Returns:
            responses; kappa: quadratic, of all pairs of raters of a response (Krippendorff's alpha for intervals but
            for its small-sample term), None where all ratings are the same; deviation: of one person's rating from
            what people give that response on average, on the dataset's own scale.
        """
        found: dict[str, dict[str, float | int | None]] = {}
        for name, (responses, ratings, total, squares, products) in self._rated.items():
            apart, spread = max(0.0, squares - products), squares - total * total / ratings
            kappa = round(1 - apart / spread, 4) if spread > 1e-9 * squares else None
            found[name] = {
                "responses": int(responses), "kappa": kappa, "deviation": round(math.sqrt(apart / ratings), 4),
            }  # fmt: skip
        return found
