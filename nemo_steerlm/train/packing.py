"""Which samples share a row. Pure functions on lengths: every rank computes the same bins from the same step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, multiple: int = 1) -> list[list[int]]:
    """Distribute samples over bins of at most `capacity` tokens, as few and as evenly filled as possible.

    First-fit-decreasing finds how many bins are needed; bisection then lowers the capacity as long as first-fit-
    decreasing still needs no more bins than that (MULTIFIT: Coffman, Garey and Johnson, 1978), which evens them out.

    Args:
        lengths: tokens of each sample, `[samples]`.
        capacity: most tokens a bin may hold; no sample is longer.
        multiple: the number of bins is a multiple of this (ranks, pipeline stages); empty bins are added.

    Returns:
        Indices into `lengths`, every one exactly once, the fullest bin first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.max(initial=0) <= capacity, f"a sample of {sizes.max(initial=0)} tokens in bins of {capacity}"
    order = np.argsort(-sizes, kind="stable")
    bins = _first_fit(sizes, order, capacity)
    count = max(1, math.ceil(len(bins) / multiple)) * multiple
    low, high = max(int(sizes.max(initial=0)), math.ceil(sizes.sum() / count)), capacity
    while high - low > capacity // 128:  # within 1 %
        middle = (low + high) // 2
        found = _first_fit(sizes, order, middle)
        if len(found) <= count:
            bins, high = found, middle
        else:
            low = middle + 1
    bins += [[] for _ in range(count - len(bins))]
    return sorted(bins, key=lambda members: -int(sizes[members].sum()))


def _first_fit(sizes: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each sample, in `order`, into the first bin that has room for it."""
    bins: list[list[int]] = []
    room = np.full(len(order), capacity)
    for index in order.tolist():
        place = int(np.argmax(room >= sizes[index]))
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
        room[place] -= sizes[index]
    return bins
