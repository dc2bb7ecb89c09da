"""Units of training: a single item, or the two items of a preference pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.tokenise import Counts
from nemo_steerlm.errors import DataError

EMPTY = -1  # in place of a missing item


def unit_lengths(lengths: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Tokens of each unit, int64 [units]; see `RegressionDataset.units`."""
    return lengths[units[:, 0]] + np.where(units[:, 1] == EMPTY, 0, lengths[units[:, 1]])


class PreferencePairs:
    """Finds the two items of each preference pair by the pair's id, in any order."""

    def __init__(self) -> None:
        self._items: dict[str, dict[str, int]] = {}
        self._strengths: dict[str, float] = {}

    def add(self, row: Conversation, item: int) -> None:
        """Note that `row` became the item of this number (raises DataError for the second of one role)."""
        assert row.pair is not None
        roles = self._items.setdefault(row.pair.id, {})
        if row.pair.role in roles:
            raise DataError(f"row '{row.id}': pair '{row.pair.id}' has a {row.pair.role} row already; ids are unique")
        roles[row.pair.role] = item
        if row.pair.role == "chosen":
            self._strengths[row.pair.id] = row.pair.strength

    def units(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counts]:
        """The units `[units, 2]`, the strength at each chosen item `[items]`, and counts.

        The incomplete half of a pair is a unit of its own where it has a label, and is left out where it has none.
        """
        other, strength = np.full(len(labels), EMPTY, np.int64), np.full(len(labels), np.nan, np.float32)
        alone = ~np.isnan(labels).all(1)
        for name, roles in self._items.items():
            if len(roles) == 2:
                chosen, rejected = roles["chosen"], roles["rejected"]
                other[chosen], strength[chosen] = rejected, self._strengths[name]
                alone[chosen], alone[rejected] = True, False
        firsts = np.flatnonzero(alone)
        complete = int((other != EMPTY).sum())
        counts: Counts = {"pairs": complete, "incomplete_pairs": len(self._items) - complete}
        return np.stack((firsts, other[firsts]), axis=1), strength, counts


def require_pairs(files: Sequence[Counts]) -> None:
    """Refuse files without any complete preference pair (raises DataError)."""
    if not sum(file["pairs"] for file in files):
        conversations = sum(file["conversations"] for file in files)
        raise no_pair(conversations, sum(file["incomplete_pairs"] for file in files))


def no_pair(conversations: int, incomplete: int) -> DataError:
    """The error for data without a complete preference pair; `incomplete` pairs have one half."""
    return DataError(
        f"loss.preference needs pairs: none of the {conversations} conversations is in a complete one "
        f'({incomplete} lack their other half); rows of a pair share "pair": {{"id", "role"}}'
    )
