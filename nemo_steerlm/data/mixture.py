"""The files of a training run as one dataset."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from nemo_steerlm.data.policy_dataset import PolicyDataset
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.data.tokenise import Counts
from nemo_steerlm.data.units import EMPTY, unit_lengths

_log = logging.getLogger(__name__)
_MANY = 20  # if one sample in so many is left out, it is logged when a training starts


class Mixture:
    """The data sets of several files as one.

    Args:
        parts: one data set a file, all of one kind.
        weights: how often an epoch draws each file's units; None = once.
        names: the files, for the report and for warnings.

    Attributes:
        lengths, units: as of the parts, one after another.
        unit_lengths: tokens of each unit, int64 [units].
        shares: of each part the number of its units and its weight.
        datasets: names of the data sets in regression data, each once; an item's ``dataset`` is an index into it.
        counts: what became of the conversations of each part.
        report: the counts of the only part, or of each part under the name of its file.
    """

    def __init__(
        self,
        parts: Sequence[RegressionDataset | PolicyDataset],
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._parts = parts
        sizes = [len(part.lengths) for part in parts]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.lengths = np.concatenate([part.lengths for part in parts])
        moved = [np.where(p.units == EMPTY, EMPTY, p.units + s) for p, s in zip(parts, self._starts, strict=True)]
        self.units = np.concatenate(moved)
        self.unit_lengths = unit_lengths(self.lengths, self.units)
        self._weights = list(weights or [1.0] * len(parts))
        self.shares = [(len(part.units), weight) for part, weight in zip(parts, self._weights, strict=True)]
        own = [getattr(part, "datasets", []) for part in parts]
        self.datasets = list(dict.fromkeys(name for names in own for name in names))
        self._dataset = [np.array([self.datasets.index(name) for name in names], np.int64) for names in own]
        self.counts = [part.report for part in parts]
        self.report: Counts | dict[str, Counts] = (
            self.counts[0] if len(parts) == 1 else dict(zip(names, self.counts, strict=True))
        )
        for name, counts in zip(names, self.counts):
            _announce(name, counts)

    @property
    def labels(self) -> np.ndarray:
        """Label vectors of all items, float32 [items, attributes], NaN where missing."""
        return np.concatenate([part.labels for part in self._parts])  # type: ignore[union-attr]

    @property
    def draws(self) -> np.ndarray:
        """How often an epoch draws each item, on average, float64 [items]."""
        return np.repeat(np.array(self._weights, np.float64), [len(part.lengths) for part in self._parts])

    def item(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """The item of the part it is in."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        item = self._parts[part].item(index - int(self._starts[part]), epoch)
        if "dataset" in item:
            item["dataset"] = self._dataset[part][item["dataset"]]
        return item


def _announce(name: str, report: Counts) -> None:
    if hidden := report.get("labels_not_shown"):
        _log.warning(
            '%s: %d labelled rows have "type": null, so they are trained on without their labels; "VALUE_TO_TEXT" '
            "shows them", name, hidden,
        )  # fmt: skip
    dropped = report.get("dropped_overlong", 0)
    if dropped * _MANY > (count := dropped + report["kept"]):
        _log.warning(
            "%s: %d of %d samples are too long and left out; a larger data.max_length keeps more",
            name, dropped, count,
        )  # fmt: skip
    if keys := report.get("unused_keys"):
        listed = ", ".join(f"{key} ({count})" for key, count in sorted(keys.items()))
        _log.info("%s: keys of turns that have no place in a prompt: %s", name, listed)
