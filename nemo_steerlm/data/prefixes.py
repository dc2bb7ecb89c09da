"""Rows of tokens that hold many texts and each shared prefix once. NumPy only.

The texts of one conversation's responses share a prefix, and so do the threads of one tree. A causal model computes
it once: in sorted order, a text continues the previous one from the first token that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# The texts of a row may be longer than the row by this factor: bounds the memory of the keys attention gathers.
_LARGEST_REUSE = 8


@dataclass(frozen=True)
class SharedRow:
    """One row of tokens.

    Attributes:
        texts: the texts in the row, as indices into the sequence they come from.
        paths: for each text the places of its tokens in the row, int64 `[its length]`.
        own: for each text the number of its last tokens that no earlier text of the row has; they are adjacent.
        tokens: the row, int64 `[tokens]`.
        positions: of each token in its text, int64 `[tokens]`.
    """

    texts: list[int]
    paths: list[np.ndarray]
    own: list[int]
    tokens: np.ndarray
    positions: np.ndarray


def shared_rows(texts: Sequence[Sequence[int]], budget: int) -> Iterator[SharedRow]:
    """Put non-empty texts into rows of at most `budget` tokens (a longer text has a row of its own)."""
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    ids = [np.asarray(texts[number], np.int64) for number in order]
    shared = [0, *map(_common, ids, ids[1:])]  # with the text before
    start = 0
    while start < len(order):
        end = _end(start, np.array([len(row) for row in ids[start : start + budget]]), shared, budget)
        yield _row(order[start:end], ids[start:end], [0, *shared[start + 1 : end]])
        start = end


def _end(start: int, lengths: np.ndarray, shared: list[int], budget: int) -> int:
    """The end of the row that begins with text `start`: the row fills more than half of the budget, if there is enough
    text, and the next row recomputes as little as possible."""
    own = lengths - shared[start : start + len(lengths)]
    own[0] = lengths[0]
    size, most = own.cumsum(), max(budget, int(own[0]))
    fits = int(np.argmax(np.append((size > most) | (lengths.cumsum() > _LARGEST_REUSE * most), True)))
    if start + fits == len(shared):
        return len(shared)
    least = 1 + int(np.argmax(size[:fits] * 2 > size[fits - 1]))
    return min(range(start + fits, start + least - 1, -1), key=lambda end: shared[end])


def _row(texts: list[int], ids: list[np.ndarray], shared: list[int]) -> SharedRow:
    """The row of some texts, the first `shared` tokens of which are those of the previous text."""
    own = [len(text) - common for text, common in zip(ids, shared, strict=True)]
    paths: list[np.ndarray] = []
    size = 0
    for count, common in zip(own, shared, strict=True):
        before = paths[-1][:common] if common else np.empty(0, np.int64)
        paths.append(np.concatenate((before, np.arange(size, size + count))))
        size += count
    tokens = np.concatenate([text[common:] for text, common in zip(ids, shared, strict=True)])
    positions = np.concatenate([np.arange(common, len(text)) for text, common in zip(ids, shared, strict=True)])
    return SharedRow(texts, paths, own, tokens, positions)


def _common(one: np.ndarray, two: np.ndarray) -> int:
    """Number of leading elements that are equal."""
    size = min(len(one), len(two))
    differ = one[:size] != two[:size]
    return int(differ.argmax()) if differ.any() else size
